"""The published methods around Bayesian knowledge distillation, one file each."""
