"""What is written to the disk and read back.

files.py        a file is there whole under its name, or not at all
tensorfile.py   tensors and plain values in one safetensors file, with a digest
checkpoint.py   flows and layers in such a file;  export.py, programs for other runtimes
"""
