"""The figures of `make gpu`: every operation on a GPU against a copy of its bytes, plain torch, torch.compile and the peers."""
