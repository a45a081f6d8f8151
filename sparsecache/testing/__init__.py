"""What tests share with users who write methods or try things: checkpoints with random weights."""
