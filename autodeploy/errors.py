"""Every error autodeploy raises on purpose: one small tree, imported by all, importing nothing.

AutodeployError
├── InvalidRequestError        (ValueError)  one request is refused; others are untouched
│   ├── EmptyPromptError
│   ├── PromptTooLongError
│   ├── UnknownTokenError
│   └── SamplingParamsError
├── ConfigError                (ValueError)  an option, keyword or file value is wrong
│   └── RecipeError
├── ModelError                               the model or checkpoint cannot be served
│   ├── CheckpointError
│   ├── UnsupportedModelError
│   │   └── NotCausalError
│   └── CaptureError
├── TransformError                           a transform failed or did not match
│   └── VerificationError
└── EngineError                              the runtime
    ├── EngineDeadError
    └── OutOfMemoryError
"""


class AutodeployError(Exception):
    """Base of all; the command line prints these as one line."""


class InvalidRequestError(AutodeployError, ValueError):
    """One request cannot be served as written."""


class EmptyPromptError(InvalidRequestError):
    """A prompt has no tokens."""


class PromptTooLongError(InvalidRequestError):
    """Prompt does not fit the context or the cache."""


class UnknownTokenError(InvalidRequestError):
    """A token id is outside the vocabulary."""


class SamplingParamsError(InvalidRequestError):
    """A sampling value is out of range or two of them contradict each other."""


class ConfigError(AutodeployError, ValueError):
    """An option is unknown, of the wrong type or out of range."""


class RecipeError(ConfigError):
    """A recipe has an unknown key or transform, or an order that cannot work."""


class ModelError(AutodeployError):
    """The model or checkpoint cannot be served."""


class CheckpointError(ModelError):
    """A checkpoint is missing, incomplete or unreadable."""


class UnsupportedModelError(ModelError):
    """The model is not an autoregressive language model over token ids."""


class NotCausalError(UnsupportedModelError):
    """Later tokens change the logits of earlier ones."""


class CaptureError(ModelError):
    """The model could not be captured exactly as one graph; the message names the cause."""


class TransformError(AutodeployError):
    """A transform failed, or matched nothing where its recipe expects a match."""


class VerificationError(TransformError):
    """A transform changed the numbers; the message names it."""


class EngineError(AutodeployError):
    """The runtime failed."""


class EngineDeadError(EngineError):
    """The engine is gone; every open request ends with this."""


class OutOfMemoryError(EngineError):
    """The caches do not fit."""
