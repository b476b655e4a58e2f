"""Running a base model: the protocols for answering and training, and the engines that implement them."""
