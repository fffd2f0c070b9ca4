"""What the commands of nanoSophia are made of."""
