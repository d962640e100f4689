"""Learning rates and weight decay as functions of the batch size, the shape of a tensor, and the step of the run."""
