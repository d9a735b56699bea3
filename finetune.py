"""Fine-tune a run on a task: python finetune.py runs/mine --task classification --train train.jsonl --run runs/task"""

from lm.cli.finetune import finetune

if __name__ == "__main__":
    finetune()
