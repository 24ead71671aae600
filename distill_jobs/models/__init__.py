"""Teachers and students of any origin behind one ``Scorer``.

A model loader builds the core of one kind of model. A new kind is one function like those in ``loaders.py``, one line
here, and its key in the spec's ``Model``. They are named, not imported: asking what a model consists of takes no torch.
"""

MODEL_LOADERS: dict[str, str] = {
    "hf": "distill_jobs.models.loaders:load_hf",
    "gguf": "distill_jobs.models.loaders:load_gguf_file",
    "config": "distill_jobs.models.loaders:load_config",
    "factory": "distill_jobs.models.loaders:load_factory",
    "saved": "distill_jobs.models.loaders:load_saved",
    "mlp": "distill_jobs.models.loaders:load_mlp",
    "cnn": "distill_jobs.models.loaders:load_cnn",
    "init_from_teacher": "distill_jobs.models.loaders:load_layers",
    "prune_teacher": "distill_jobs.models.loaders:load_pruned",
}
