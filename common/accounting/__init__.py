"""What a method costs, counted without data: multiply-accumulates, parameters and memory."""
