"""Runs on image folders at ImageNet's size: any number of processes, teachers in the loop or cached, checkpoints throughout."""
