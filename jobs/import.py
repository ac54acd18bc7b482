"""Turn a published classifier into a model bundle.

On this machine:
    python jobs/import.py tiatoolbox:resnet50-pcam --weights resnet50-pcam.pth --output models/pcam
    python jobs/import.py wsinfer --publisher-config config.json --weights model.safetensors \\
        --malignant Tumor --output models/brca --license "as its publisher states it"
On a cluster:
    ray job submit --working-dir . -- python jobs/import.py tiatoolbox:resnet50-pcam \\
        --weights s3://bucket/resnet50-pcam.pth --output s3://bucket/models/pcam
"""

from bcd import cli

if __name__ == "__main__":
    cli.main("import", __doc__)
