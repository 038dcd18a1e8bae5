"""Fine-tuning of text classifiers: labelled lines in, a classifier's folder and honest figures out.

from spikelm.train.finetune.config import FinetuneConfig
from spikelm.train.finetune.seeds import finetune

report = finetune(FinetuneConfig.from_yaml("subj", ["seeds=3"]))
"""
