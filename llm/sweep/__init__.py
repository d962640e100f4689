"""Many runs as one: jobs in processes of their own, a manifest of what became of them, and their resumption."""
