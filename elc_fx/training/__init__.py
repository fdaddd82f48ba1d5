"""Fine-tuning: the loop, what it keeps in files, and images to train on."""
