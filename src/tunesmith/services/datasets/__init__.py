"""Dataset versions, their rows, and the review queue that changes them."""
