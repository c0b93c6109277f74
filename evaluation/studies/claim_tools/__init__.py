"""What all claims share: the definition of a claim, its command, and code for training and drawing."""
