"""Settings of the jobs that import, export, sign, verify and push a model bundle, and of those that require
a signature."""

import tyro
from pydantic import Field

from bcd.config.options import MAX_INPUT_PX, MIN_INPUT_PX, Config, Operational

Triple = tuple[float, float, float]


class ImportConfig(Config):
    """Turn a published classifier into a model bundle; no code of its publisher is run.

    The weights are a state dict (.safetensors, or .pth and .bin without pickled code) of a ResNet of
    torchvision or a network of timm; a TorchScript program is rejected. What the publisher's files do not
    state is given by flags; a flag that contradicts them is rejected. Numbers of the publisher are marked as
    stated, not measured, until jobs/evaluate.py measures others.
    """

    published: tyro.conf.Positional[str]
    """Who published it, and the name: tiatoolbox:resnet50-pcam (resnet18, 34, 50 or 101; -pcam or
    -kather100k); wsinfer, with --publisher-config; timm:resnet50, or timm with --publisher-config;
    torchvision:resnet50."""

    weights: str
    """The publisher's file of weights: a local path, s3:// or gs://."""

    output: str
    """Folder for the bundle, which must be empty: local, s3:// or gs://."""

    publisher_config: str | None = None
    """The publisher's config.json, of WSInfer's zoo or of timm: a local path, s3:// or gs://."""

    classes: tuple[str, ...] = ()
    """Names of the classes in the order of the logits; of a network with one logit, its class alone."""

    malignant: tuple[str, ...] = ()
    """The classes that count as malignant; all others count as benign. tiatoolbox: those of the tumour."""

    mpp: float | None = None
    """µm per pixel of the tiles that the network was trained on."""

    input_px: int | None = Field(default=None, ge=MIN_INPUT_PX, le=MAX_INPUT_PX)
    """Side of the network's square input in pixels."""

    tile_px: int | None = Field(default=None, ge=1)
    """Side in pixels, at --mpp, of the tiles that are resized to the input; by default that of the input."""

    mean: Triple | None = None
    """Mean of red, green and blue, of values from 0 to 1, that is subtracted; 0 0 0 where nothing is."""

    std: Triple | None = None
    """Standard deviation of red, green and blue, by which they are divided; 1 1 1 where they are not."""

    source: str | None = None
    """Where the weights are from, for the card; by default publisher and name."""

    license: str | None = None
    """Licence of the weights, for the card. tiatoolbox: that of the data, which the publisher states."""

    citation: str | None = None
    """The publication to cite, for the card."""

    trained_on: str | None = None
    """The images that it was trained on, for the card."""

    stated: tuple[str, ...] = ()
    """Numbers of the publisher, as NAME=VALUE: "AUC=0.96" "sensitivity=0.85 (0.80 to 0.89)"."""

    stated_on: str | None = None
    """The images behind these numbers."""


class ExportConfig(Config):
    """Write a model bundle as an ONNX file, which programs of others run.

    Its outputs are logits, pooled features and, where the model has it in closed form, the evidence map; its
    metadata state how an image becomes the input. On a canary image they must be the bundle's to 1e-4, else
    no file is written. Research use only, as the bundle. Requires `pip install onnx onnxscript`.
    """

    bundle: tyro.conf.Positional[str]
    """The model bundle: a local folder, s3://, gs:// or hf://OWNER/NAME[@REVISION]."""

    output: tyro.conf.Positional[str]
    """The file, which must not exist: a local path, s3:// or gs://."""


class SignConfig(Config):
    """Sign a model bundle: others can then verify that it is unchanged, and who signed it.

    The signature covers every file of the bundle and is written beside them as model.sig, in the format of
    OpenSSF Model Signing. Sign last: whatever is changed, added or removed later makes it invalid. Requires
    `pip install model-signing pyopenssl`. No network is used, except for the bundle itself.
    """

    bundle: tyro.conf.Positional[str]
    """The model bundle: a local folder, s3:// or gs://."""

    key: str
    """File with the private key, on this machine: PEM, elliptic curve P-256, P-384 or P-521, as made by
    `openssl ecparam -name prime256v1 -genkey -noout -out signing.pem`. Those who verify need its public half:
    `openssl ec -in signing.pem -pubout -out signing.pub`. The variable BCD_KEY_PASSWORD holds the password of
    an encrypted key."""

    certificate: str | None = None
    """File with the certificate of the key, on this machine, and after it those that lead to a root: PEM.
    Those who verify then need the certificate of the root, not the public key. The key may not be
    encrypted."""


class VerifyConfig(Config):
    """Verify that a model bundle is as it was signed: no file changed, added or removed.

    Exit code 0 if so, 2 with one sentence if not. Requires `pip install model-signing pyopenssl`. No network
    is used, except for the bundle itself.
    """

    bundle: tyro.conf.Positional[str]
    """The model bundle: a local folder, s3://, gs:// or hf://OWNER/NAME[@REVISION]."""

    key: str
    """File with the public key of who signed the bundle, or with the root certificates to which the signer's
    certificate must lead: PEM, a local path, s3:// or gs://."""


class PushConfig(Config):
    """Push a model bundle to a repository of the Hugging Face Hub, as one commit.

    The repository is made if there is none, private unless --public. The bundle is checked first; files of an
    earlier bundle that this one lacks, such as a signature, are deleted there, others stay. All of the bundle
    is published: card and provenance name the data, the command and the packages. Requires
    `pip install huggingface_hub`, and in the variable HF_TOKEN a token that may write.
    """

    bundle: tyro.conf.Positional[str]
    """The model bundle: a local folder, s3://, gs:// or hf://."""

    target: tyro.conf.Positional[str]
    """hf://OWNER/NAME, or hf://OWNER/NAME@BRANCH of a branch that exists."""

    license: str | None = Field(default=None, pattern=r"^[a-z0-9][a-z0-9.-]{0,99}$")
    """Licence under which the bundle is published, an id of the hub's list such as apache-2.0 or cc-by-4.0.
    It is written into the bundle's card and README, so state it before you sign. Weights from elsewhere and
    the data may forbid some."""

    public: bool = False
    """Everybody can see a repository that is made by this push."""


class SignedConfig(Config):
    """Settings of a job that may require a signed model."""

    require_signature: Operational[str | None] = None
    """Use the model only if its signature is valid for this public key or root certificate, see --key of
    jobs/verify.py. It is verified when the job starts; processes that load another bundle later reject it."""
