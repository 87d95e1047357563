"""Weights to and from the layouts in which others publish and load them.

`names` says what each tensor is called there, `model_configs` translates the sizes, `files` reads and writes the files
of a folder, `source` opens whatever weights can be taken from, `export` writes a folder and has `verify` load it
back, `import_run` makes a run folder of published weights.
"""
