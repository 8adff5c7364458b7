"""Data sets, by name or out of files, in a fixed train / validation / test split.

datasets   the named sets, their splits; anything else that can be read
sources    where their files are looked for, and how they are fetched
readers    IDX, CIFAR-10, .mat, .npy, .npz, .csv, .parquet; matlab for the third
toys       densities in the plane that are known exactly
"""

from .datasets import DATASETS, Dataset, inventory, load_data, split_rows
from .sources import Entry, Source
from .toys import TOYS, toy, toy_log_prob

__all__ = [
    "DATASETS",
    "TOYS",
    "Dataset",
    "Entry",
    "Source",
    "inventory",
    "load_data",
    "split_rows",
    "toy",
    "toy_log_prob",
]
