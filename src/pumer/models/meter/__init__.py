"""METER (Dou et al., CVPR 2022), which is not in transformers; importing this registers it with the
Auto classes."""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForVisualQuestionAnswering,
    AutoProcessor,
)

from pumer.models.meter.configuration import MeterConfig
from pumer.models.meter.heads import (
    MeterForImageAndTextRetrieval,
    MeterForImagesAndTextClassification,
    MeterForMaskedLM,
    MeterForQuestionAnswering,
    MeterForVisualEntailment,
)
from pumer.models.meter.modeling import MeterModel, MeterModelOutput, MeterPreTrainedModel
from pumer.models.meter.processing import MeterImageProcessor, MeterProcessor

__all__ = [
    "MeterConfig",
    "MeterForImageAndTextRetrieval",
    "MeterForImagesAndTextClassification",
    "MeterForMaskedLM",
    "MeterForQuestionAnswering",
    "MeterForVisualEntailment",
    "MeterImageProcessor",
    "MeterModel",
    "MeterModelOutput",
    "MeterPreTrainedModel",
    "MeterProcessor",
]

AutoConfig.register("meter", MeterConfig)
AutoModel.register(MeterConfig, MeterModel)
AutoModelForVisualQuestionAnswering.register(MeterConfig, MeterForQuestionAnswering)
AutoModelForMaskedLM.register(MeterConfig, MeterForMaskedLM)
AutoProcessor.register(MeterConfig, MeterProcessor)
AutoImageProcessor.register(MeterConfig, image_processor_classes={"pil": MeterImageProcessor})
