"""Write a model bundle as an ONNX file, checked against the bundle.

On this machine:
    python jobs/export.py runs/train/model model.onnx
On a cluster:
    ray job submit --working-dir . -- python jobs/export.py s3://bucket/model s3://bucket/model.onnx
"""

from bcd import cli

if __name__ == "__main__":
    cli.main("export", __doc__)
