"""The table of contents of the pack: every node, under the name that workflows know it by."""

from .bake_lora import SVDQuantBakeLora
from .calibrate import SVDQuantCalibrate
from .compare_models import SVDQuantCompare
from .convert_model import SVDQuantConvertModel
from .demo import SVDQuantDemoDecode, SVDQuantDemoModel, SVDQuantDemoPrompt, SVDQuantDemoVae
from .download_model import SVDQuantDownloadModel
from .load_checkpoint import SVDQuantLoadCheckpoint
from .load_lora import SVDQuantLoadLora
from .load_model import SVDQuantLoadModel
from .lora_info import SVDQuantLoraInfo
from .lora_limits import SVDQuantLoraLimits
from .model_info import SVDQuantModelInfo
from .quantize_model import SVDQuantQuantizeModel

NODE_CLASS_MAPPINGS: dict[str, type] = {
    "SVDQuantLoadModel": SVDQuantLoadModel,
    "SVDQuantLoadCheckpoint": SVDQuantLoadCheckpoint,
    "SVDQuantCalibrate": SVDQuantCalibrate,
    "SVDQuantQuantizeModel": SVDQuantQuantizeModel,
    "SVDQuantCompare": SVDQuantCompare,
    "SVDQuantDownloadModel": SVDQuantDownloadModel,
    "SVDQuantConvertModel": SVDQuantConvertModel,
    "SVDQuantModelInfo": SVDQuantModelInfo,
    "SVDQuantLoadLora": SVDQuantLoadLora,
    "SVDQuantLoraInfo": SVDQuantLoraInfo,
    "SVDQuantLoraLimits": SVDQuantLoraLimits,
    "SVDQuantBakeLora": SVDQuantBakeLora,
    "SVDQuantDemoModel": SVDQuantDemoModel,
    "SVDQuantDemoPrompt": SVDQuantDemoPrompt,
    "SVDQuantDemoDecode": SVDQuantDemoDecode,
    "SVDQuantDemoVae": SVDQuantDemoVae,
}

NODE_DISPLAY_NAME_MAPPINGS: dict[str, str] = {
    "SVDQuantLoadModel": "SVDQuant Load Model",
    "SVDQuantLoadCheckpoint": "SVDQuant Load Checkpoint",
    "SVDQuantCalibrate": "SVDQuant Calibrate",
    "SVDQuantQuantizeModel": "SVDQuant Quantize Model",
    "SVDQuantCompare": "SVDQuant Compare",
    "SVDQuantDownloadModel": "SVDQuant Download Model",
    "SVDQuantConvertModel": "SVDQuant Convert Model",
    "SVDQuantModelInfo": "SVDQuant Model Info",
    "SVDQuantLoadLora": "SVDQuant Load LoRA",
    "SVDQuantLoraInfo": "SVDQuant LoRA Info",
    "SVDQuantLoraLimits": "SVDQuant LoRA Limits",
    "SVDQuantBakeLora": "SVDQuant Bake LoRA",
    "SVDQuantDemoModel": "SVDQuant Demo Model",
    "SVDQuantDemoPrompt": "SVDQuant Demo Prompt",
    "SVDQuantDemoDecode": "SVDQuant Demo Decode",
    "SVDQuantDemoVae": "SVDQuant Demo VAE",
}
