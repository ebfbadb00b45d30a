"""Training on images: the backbone with its joint classifier, resumable exactly; single heads."""

from timm_lt.training.checks import check_batch_size as check_batch_size
from timm_lt.training.checks import check_classifier as check_classifier
from timm_lt.training.checks import check_model as check_model
from timm_lt.training.checks import check_optimization as check_optimization
from timm_lt.training.checks import check_pairs as check_pairs
from timm_lt.training.checks import check_schedule as check_schedule
from timm_lt.training.checks import start_classifier as start_classifier
from timm_lt.training.frozen import check_statistics as check_statistics
from timm_lt.training.frozen import check_trained as check_trained
from timm_lt.training.head import HeadPlan as HeadPlan
from timm_lt.training.head import check_image_options as check_image_options
from timm_lt.training.head import plan_head_on_images as plan_head_on_images
from timm_lt.training.head import train_head_on_images as train_head_on_images
from timm_lt.training.history import EpochRecord as EpochRecord
from timm_lt.training.history import best_record as best_record
from timm_lt.training.history import describe_history as describe_history
from timm_lt.training.history import representation_seconds as representation_seconds
from timm_lt.training.loop import EVAL_BATCH_SIZE as EVAL_BATCH_SIZE
from timm_lt.training.loop import train_representation as train_representation
from timm_lt.training.state import TrainingState as TrainingState
from timm_lt.training.update import check_update as check_update
