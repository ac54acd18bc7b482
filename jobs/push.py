"""Push a model bundle to a repository of the Hugging Face Hub.

On this machine:
    HF_TOKEN=... python jobs/push.py runs/train/model hf://owner/name --license cc-by-4.0
On a cluster:
    ray job submit --working-dir . -- python jobs/push.py s3://bucket/model hf://owner/name
"""

from bcd import cli

if __name__ == "__main__":
    cli.main("push", __doc__)
