"""Training on images: the representation stage, resumable exactly, and single heads."""

from timm_lt.training.head import HeadOptions as HeadOptions
from timm_lt.training.head import HeadTrainer as HeadTrainer
from timm_lt.training.head import train_head_on_images as train_head_on_images
from timm_lt.training.loop import EVAL_BATCH_SIZE as EVAL_BATCH_SIZE
from timm_lt.training.loop import RepresentationTrainer as RepresentationTrainer
from timm_lt.training.loop import TrainingOptions as TrainingOptions
from timm_lt.training.loop import train_representation as train_representation
from timm_lt.training.parts import check_model as check_model
from timm_lt.training.parts import start_classifier as start_classifier
from timm_lt.training.state import EpochRecord as EpochRecord
from timm_lt.training.state import TrainingState as TrainingState
from timm_lt.training.state import best_record as best_record
from timm_lt.training.state import describe_history as describe_history
from timm_lt.training.state import representation_seconds as representation_seconds
