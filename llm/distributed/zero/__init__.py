"""What ZeRO's engine holds, read and written under the names of parameters; nothing here imports DeepSpeed."""
