"""What other programs call our settings and commands, for messages about unknown ones."""

from __future__ import annotations

from collections.abc import Iterable

SHARE = "it is a share of the steps, from 0 to 1"

# Our name, the names elsewhere, and a remark if the meaning differs. The first matching row counts.
OTHER_NAMES = (
    ("learning_rate", "lr max_lr peak_lr base_lr step_size max_learning_rate", ""),
    ("final_learning_rate_fraction", "min_lr lr_min end_lr", "it is a share of the peak, from 0 to 1"),
    (
        "batch_tokens",
        "batch_size train_batch_size total_batch_size global_batch_size per_device_train_batch_size",
        "it counts tokens: multiply the sequences by the context length",
    ),
    ("batch_examples", "batch_size train_batch_size total_batch_size per_device_train_batch_size", ""),
    ("rows", "batch_size", ""),
    ("micro_batch_tokens", "micro_batch_size device_batch_size", "it counts tokens"),
    ("micro_batch_rows", "micro_batch_size device_batch_size", ""),
    (
        "micro_batch_rows",
        "gradient_accumulation_steps grad_accum grad_accumulation_steps accumulation_steps",
        "a batch is accumulated from micro-batches of this many rows",
    ),
    ("micro_batch_tokens", "gradient_accumulation_steps grad_accum accumulation_steps", "it counts tokens"),
    ("epochs", "num_epochs num_train_epochs n_epochs max_epochs epoch", ""),
    (
        "steps",
        "epochs num_epochs num_train_epochs n_epochs max_epochs epoch",
        "an epoch is the training tokens divided by batch_tokens, in steps",
    ),
    ("steps", "max_steps max_iters iters iterations num_steps num_iterations train_steps total_steps n_steps", ""),
    (
        "epochs",
        "steps max_steps max_iters iters iterations num_steps train_steps",
        "it counts passes over the examples",
    ),
    (
        "context_length",
        "block_size seq_len seq_length sequence_length max_seq_len max_seq_length max_length context_size context "
        "n_ctx ctx_size ctx_len context_window max_position_embeddings",
        "",
    ),
    ("num_layers", "n_layer n_layers layers depth num_hidden_layers", ""),
    ("num_heads", "n_head n_heads heads num_attention_heads", ""),
    ("num_key_value_heads", "n_kv_head n_kv_heads num_kv_heads kv_heads", ""),
    ("hidden_size", "n_embd n_embed d_model dim embed_dim emb_dim embedding_size hidden_dim model_dim width", ""),
    ("feed_forward_size", "d_ff ffn_dim intermediate_size mlp_dim ffn_hidden_size feed_forward_dim", ""),
    ("head_size", "head_dim d_head", ""),
    ("vocab_size", "n_vocab vocabulary_size vocab num_tokens", ""),
    ("tie_embeddings", "tie_word_embeddings weight_tying tied_embeddings", ""),
    ("rope_theta", "rope_base rope_freq_base", ""),
    ("norm_epsilon", "norm_eps rms_norm_eps layer_norm_eps", ""),
    ("mask_rate", "mask_prob mlm_probability mlm_prob mask_ratio masking_rate", ""),
    ("weight_decay", "wd l2 decay_rate", ""),
    ("warmup_fraction", "warmup warmup_steps warmup_iters warmup_ratio num_warmup_steps lr_warmup_steps", SHARE),
    ("decay_fraction", "decay decay_steps lr_decay_iters cooldown cooldown_steps", SHARE),
    ("gradient_clip", "grad_clip clip clip_grad max_grad_norm clip_grad_norm gradient_clip_val", ""),
    ("beta1", "adam_beta1 beta_1", ""),
    ("beta2", "adam_beta2 beta_2", ""),
    ("precision", "dtype fp16 bf16 mixed_precision amp", "it is float32, bfloat16 or auto"),
    ("validate_every", "eval_interval eval_every eval_steps val_every val_interval val_check_interval eval_iters", ""),
    ("validations_per_epoch", "eval_interval eval_every eval_steps val_check_interval", "it counts per epoch"),
    ("checkpoint_every", "save_every save_steps save_interval checkpoint_interval ckpt_interval", ""),
    ("keep_checkpoints", "save_total_limit", ""),
    ("log_every", "log_interval logging_steps log_steps", ""),
    ("trackers", "wandb report_to logger tracker", ""),
    ("threads", "num_threads n_threads", ""),
    ("workers", "num_workers num_proc n_workers jobs processes", ""),
    ("seed", "random_seed rng_seed manual_seed random_state", ""),
    ("patience", "early_stopping early_stopping_patience", ""),
    ("lora_rank", "lora_r rank r", ""),
    ("lora_matrices", "target_modules lora_target_modules", ""),
    ("resume", "resume_from_checkpoint resume_from continue", ""),
    ("run", "out_dir output_dir save_dir run_dir run_name out output", ""),
    ("out", "out_dir output_dir save_dir output", ""),
    ("output", "out out_file output_file", ""),
    ("data", "dataset data_dir data_path train_data train_file", ""),
    ("train", "train_file train_data training_data dataset data", ""),
    ("validation", "validation_file val_file eval_file valid val dev val_data", ""),
    ("text_field", "text_column text_key json_key jsonl_field column field", ""),
    ("text_column", "text_field text_key", ""),
    ("label_column", "label_field label_key target_column labels_column", ""),
    ("checkpoint", "ckpt step", ""),
    ("trials", "n_trials num_trials max_trials run_cap", ""),
    ("measure", "metric monitor objective_metric", ""),
    # commands
    ("train", "pretrain fit", ""),
    ("sweep", "hpo search grid_search multirun optuna", ""),
    ("sample", "generate gen complete chat write fill", ""),
    ("evaluate", "eval test score perplexity", ""),
    ("predict", "classify infer inference tag", ""),
    ("prep build", "tokenize prepare preprocess", ""),
    ("import", "load from_pretrained", ""),
    ("serve", "server api web", ""),
    # generating text
    ("temperature", "temp t", ""),
    ("temperature", "do_sample greedy", "0 takes the most likely token"),
    ("temperature", "num_beams beams beam_size", "there is no beam search; temperature 0 takes the most likely token"),
    ("top_k", "topk k", ""),
    ("top_p", "topp nucleus p", ""),
    ("min_p", "minp", ""),
    ("repetition_penalty", "repeat_penalty rep_penalty rep_pen", ""),
    (
        "max_new_tokens",
        "max_tokens num_tokens n_predict num_predict max_gen_len tokens_to_generate n_tokens length",
        "",
    ),
    ("max_new_tokens", "max_length", "it counts new tokens only"),
    ("stop", "stop_sequence stop_sequences stop_token stop_strings", ""),
    ("prompt", "prompts text start input_text num_samples num_return_sequences n_samples", "it may be repeated"),
    # preparing data
    ("tokenizer_kind", "tokenizer_type model_type tokenizer_model", ""),
    ("tokenizer", "tokenizer_path tokenizer_name tokenizer_file pretrained_tokenizer", ""),
    ("validation_fraction", "val_fraction val_split val_ratio valid_fraction validation_split test_size val_size", ""),
    ("extra_token", "special_token special_tokens add_special_tokens user_defined_symbols", "it may be repeated"),
    ("shard_tokens", "shard_size tokens_per_shard", ""),
    ("duplicates", "dedup dedupe deduplicate deduplication", ""),
    ("language", "lang languages", ""),
    ("size", "image_size img_size resolution resize input_size crop_size", "in pixels a side"),
    ("channels", "in_chans in_channels num_channels image_channels grayscale rgb", "it is 1 or 3"),
    ("prep images", "imagefolder image_folder", ""),
    ("max_document_bytes", "max_length max_doc_length max_document_length", "it counts bytes of UTF-8"),
)


def other_name(name: str, known: Iterable[str]) -> str:
    """Return the end of a message about an unknown name: what it is called here, or "" if no other program uses it.

    ``known`` are our options (``--learning-rate``), settings (``learning_rate``) or commands.
    """
    plain, here = _plain(name), {_plain(each): each for each in known}
    for ours, others, remark in OTHER_NAMES:
        if ours in here and plain in others.split():
            return f': did you mean "{here[ours]}"?' + (f" ({remark})" if remark else "")
    return ""


def _plain(name: str) -> str:
    return name.lstrip("-").replace("-", "_").lower()
