"""TRL's trainer for tools/bench.py (pip install trl==1.16.0)."""

import tempfile


def trl_batches(student, tokenizer, rollouts, batch, alone):
    """The same rollouts for TRL's SDFTTrainer, `batch` rows at a time: [(its compute_loss, what its
    own code makes of the rows), ...].

    It pads all that it samples at once to one length, the whole step as a rule; `alone`: each batch
    sampled by itself (steps_per_generation 1). Left out, in its favour: its sampling, the making of
    the batches, its Trainer loop.
    """
    from datasets import Dataset
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer
    from trl.trainer.utils import split_tensor_dict

    count = len(rollouts) // batch
    settings = SDFTConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=count,
        steps_per_generation=1 if alone else count,
        num_generations=1,
        distillation_mode="full_logits",
        distillation_alpha=1.0,
        distillation_is_clip=None,
        num_loss_tokens_to_skip=0,
        disable_dropout=True,
        gradient_checkpointing=False,
        bf16=False,
        report_to=[],
        use_cpu=student.device.type == "cpu",
        teacher_model_kind="base",
    )
    numbers = range(len(rollouts))
    rows = [dict(prompt=f"prompt {i}", privileged_context=f"context {i}") for i in numbers]
    trainer = SDFTTrainer(
        model=student,
        args=settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    ids = {f"prompt {i}": r.prompt_ids for i, r in enumerate(rollouts)}
    ids |= {f"prompt {i}, context {i}": r.teacher_row[0] for i, r in enumerate(rollouts)}
    responses = {tuple(r.prompt_ids): r.response_ids for r in rollouts}
    trainer.teacher_context_builder._compose_teacher_prompt = "{}, {}".format
    trainer._tokenize_prompts = lambda prompts: [ids[prompt] for prompt in prompts]
    trainer._generate = lambda prompts: (prompts, [responses[tuple(prompt)] for prompt in prompts])
    trainer.current_gradient_accumulation_steps = count  # its train() would set it
    student.train()
    sampled = batch if alone else len(rollouts)
    batches = []
    for first in range(0, len(rollouts), sampled):
        together = trainer._prepare_training_batch(rows[first : first + sampled])
        batches += split_tensor_dict(together, sampled // batch)
    return [(trainer.compute_loss, inputs) for inputs in batches]
