"""LAYER 3: ComfyUI. The table of contents of the pack."""

from .bake_lora import SVDQuantBakeLora
from .convert_model import SVDQuantConvertModel
from .demo import SVDQuantDemoDecode, SVDQuantDemoModel, SVDQuantDemoPrompt
from .download_model import SVDQuantDownloadModel
from .load_model import SVDQuantLoadModel
from .lora_info import SVDQuantLoraInfo
from .lora_limits import SVDQuantLoraLimits
from .model_info import SVDQuantModelInfo
from .quantize_model import SVDQuantQuantizeModel

NODE_CLASS_MAPPINGS = {
    "SVDQuantLoadModel": SVDQuantLoadModel,
    "SVDQuantQuantizeModel": SVDQuantQuantizeModel,
    "SVDQuantDownloadModel": SVDQuantDownloadModel,
    "SVDQuantConvertModel": SVDQuantConvertModel,
    "SVDQuantModelInfo": SVDQuantModelInfo,
    "SVDQuantLoraInfo": SVDQuantLoraInfo,
    "SVDQuantLoraLimits": SVDQuantLoraLimits,
    "SVDQuantBakeLora": SVDQuantBakeLora,
    "SVDQuantDemoModel": SVDQuantDemoModel,
    "SVDQuantDemoPrompt": SVDQuantDemoPrompt,
    "SVDQuantDemoDecode": SVDQuantDemoDecode,
}

NODE_DISPLAY_NAME_MAPPINGS = {
    "SVDQuantLoadModel": "SVDQuant Load Model",
    "SVDQuantQuantizeModel": "SVDQuant Quantize Model",
    "SVDQuantDownloadModel": "SVDQuant Download Model",
    "SVDQuantConvertModel": "SVDQuant Convert Model",
    "SVDQuantModelInfo": "SVDQuant Model Info",
    "SVDQuantLoraInfo": "SVDQuant LoRA Info",
    "SVDQuantLoraLimits": "SVDQuant LoRA Limits",
    "SVDQuantBakeLora": "SVDQuant Bake LoRA",
    "SVDQuantDemoModel": "SVDQuant Demo Model",
    "SVDQuantDemoPrompt": "SVDQuant Demo Prompt",
    "SVDQuantDemoDecode": "SVDQuant Demo Decode",
}
