"""What a block keeps, in how many bits and where it lies: each technique on a plain nn.Module."""
