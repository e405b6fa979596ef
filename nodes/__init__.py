"""LAYER 3: ComfyUI. The table of contents of the pack."""

from .demo import SVDQuantDemoDecode, SVDQuantDemoModel, SVDQuantDemoPrompt
from .download_model import SVDQuantDownloadModel
from .load_model import SVDQuantLoadModel
from .model_info import SVDQuantModelInfo
from .quantize_model import SVDQuantQuantizeModel

NODE_CLASS_MAPPINGS = {
    "SVDQuantLoadModel": SVDQuantLoadModel,
    "SVDQuantQuantizeModel": SVDQuantQuantizeModel,
    "SVDQuantDownloadModel": SVDQuantDownloadModel,
    "SVDQuantModelInfo": SVDQuantModelInfo,
    "SVDQuantDemoModel": SVDQuantDemoModel,
    "SVDQuantDemoPrompt": SVDQuantDemoPrompt,
    "SVDQuantDemoDecode": SVDQuantDemoDecode,
}

NODE_DISPLAY_NAME_MAPPINGS = {
    "SVDQuantLoadModel": "SVDQuant Load Model",
    "SVDQuantQuantizeModel": "SVDQuant Quantize Model",
    "SVDQuantDownloadModel": "SVDQuant Download Model",
    "SVDQuantModelInfo": "SVDQuant Model Info",
    "SVDQuantDemoModel": "SVDQuant Demo Model",
    "SVDQuantDemoPrompt": "SVDQuant Demo Prompt",
    "SVDQuantDemoDecode": "SVDQuant Demo Decode",
}
