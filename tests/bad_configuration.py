"""Bad configuration: flags, YAML files and taxonomies that cannot be used."""

from __future__ import annotations

from workbench import case


@case("unknown flag --lerning_rate (did you mean --learning_rate?)")
def a_misspelt_flag(bench):
    return bench.train(lerning_rate=1)


@case("{folder}/run.yaml: unknown key lora_rank (did you mean lora_r?)")
def a_misspelt_key(bench):
    return bench.config("lora_rank: 8")


@case("{folder}/run.yaml: lora_r: 'eight' is not valid, expected a whole number")
def text_for_a_number(bench):
    return bench.config("lora_r: eight")


@case("lora_r: [8] is not valid, expected a whole number")
def a_list_for_a_number(bench):
    return bench.config("lora_r: [8]")


@case("use_rslora: 'maybe' is not valid, expected True or False")
def a_word_for_a_switch(bench):
    return bench.config("use_rslora: maybe")


@case("learning_rate: nan is not valid, expected a finite number")
def a_rate_that_is_no_number(bench):
    return bench.config("learning_rate: .nan")


@case("--learning_rate: '1e999' is not valid, expected a finite number")
def an_infinite_rate(bench):
    return bench.train(learning_rate="1e999")


@case("--max_length: -5 is not valid, must be at least 16")
def a_negative_size(bench):
    return bench.train(max_length=-5)


@case("--per_device_train_batch_size: 0 is not valid, must be at least 1")
def a_size_of_zero(bench):
    return bench.train(per_device_train_batch_size=0)


@case("--lr_scheduler_type: 'cosin' is not valid, allowed: cosine, linear", "(did you mean cosine?)")
def an_unknown_schedule(bench):
    return bench.train(lr_scheduler_type="cosin")


@case("--bf16 True contradicts --dtype float32; drop one")
def two_types_at_once(bench):
    return bench.train(bf16=True, dtype="float32")


@case("--max_tokens_per_micro_batch 64: is below --max_length 128")
def a_budget_below_the_length(bench):
    return bench.train(max_tokens_per_micro_batch=64)


@case("--overwrite_output_dir would remove the checkpoint of --resume")
def a_start_over_that_goes_on(bench):
    return bench.train(overwrite_output_dir=True, resume="out/checkpoints/step-000001")


@case("unexpected argument '-max_steps'; every option is a flag, see --help")
def a_flag_with_one_dash(bench):
    return [*bench.train(), "-max_steps", "1"]


@case("unexpected argument '-host'; every option is a flag, see --help")
def a_flag_with_one_dash_that_begins_like_help(bench):
    return ["serve", "--model_path", str(bench.folder), "-host", "localhost"]


@case("a: cannot be used (File name too long); give another path")
def a_model_whose_name_is_too_long(bench):
    return bench.evaluate(model="a" * 300)


@case("--api_key_file {folder}/\\x00: cannot be read (embedded null byte)")
def a_file_of_keys_that_no_system_has(bench):
    path = bench.write("serve.yaml", f'model_path: {bench.folder}\napi_key_file: "{bench.folder}/\\0"\n')
    return ["serve", "--config", str(path)]


@case("--config {folder}/run.yaml: is not valid YAML (key lora_r stands twice)")
def a_key_that_stands_twice(bench):
    return bench.config("lora_r: 8\nseed: 1\nlora_r: 16")


@case("{folder}/run.yaml: evaluation_strategy means eval_strategy, which stands there already; keep one")
def a_key_under_two_names(bench):
    return bench.config("eval_strategy: no\nevaluation_strategy: epoch")


@case("--config {folder}/run.yaml: must hold `key: value` lines, found a list")
def a_configuration_that_is_a_list(bench):
    return bench.config("- lora_r: 8")


@case("--config {folder}/run.yaml: is not valid YAML", "python/object/apply:os.system")
def a_configuration_with_code_in_it(bench):
    return bench.config(f"seed: !!python/object/apply:os.system ['touch {bench.folder}/run-by-yaml']")


@case("--config {folder}/run.yaml: is not valid YAML", "'\\t'")
def a_configuration_with_tabs(bench):
    return bench.config("fsdp:\n\tfull_shard")


@case("--config {folder}/run.yaml: is not valid YAML", "utf-8")
def a_configuration_in_another_encoding(bench):
    return bench.train(config=bench.write("run.yaml", "taxonomy: Fälle.yaml".encode("latin-1")))


@case("{folder}/run.yaml: use_rslora: [[[...], ", "is not valid, expected a single value")
def a_configuration_that_unfolds_without_end(bench):
    nested = "&k0 [x]"
    for i in range(1, 12):
        nested = f"&k{i} [{nested}, {', '.join([f'*k{i - 1}'] * 8)}]"
    return bench.config(f"use_rslora: {nested}")


@case("--config {folder}: cannot be read (Is a directory); give the path of a YAML file")
def a_configuration_that_is_a_directory(bench):
    return bench.train(config=bench.folder)


@case("--config: needs a value, the path of a YAML file")
def a_flag_without_its_value(bench):
    return [*bench.train(), "--config"]


@case("--output_dir is missing: run directory")
def a_required_option_left_out(bench):
    return bench.train(output_dir=None)


@case("unexpected argument 'rows.jsonl'; every option is a flag, see --help")
def a_stray_word(bench):
    return ["train", "rows.jsonl", *bench.train()[1:]]


@case("{folder}/harms.yaml: taxonomy: categories repeat violence; each name may stand once")
def a_taxonomy_with_a_category_twice(bench):
    return bench.train(taxonomy=bench.write("harms.yaml", "categories: [violence, violence]"))


@case("--metric_for_best_model micro/f2: is no metric of this taxonomy (did you mean micro/f1?)")
def an_unknown_metric(bench):
    return bench.train(metric_for_best_model="micro/f2")


@case("--shard 9/8: there are only shards 1/8 to 8/8")
def a_shard_beyond_the_last(bench):
    return bench.predict(shard="9/8")


@case("--seed: 9223372036854775808 is not valid, must be at most 9223372036854775807")
def a_number_beyond_64_bits(bench):
    return bench.train(seed=2**63)
