"""What trains: weights, adapters and optimizers put together in one order, the loss and the update."""
