"""Of dear tests the cases that `make test` takes, of some none; `make test-all` takes the others.

Two scripts stand for the four where test_structure.py proves that all make the same calls in the same order, one of the
two where a test is about a service alone. A case is named by the text between the brackets of its id.
"""

FEW = {
    "test_any_clip.py::test_40_draws": ["pyav"],
    "test_atomic_save.py::test_a_save_killed_at_every_file_operation_loses_nothing": ["a new one, the oldest goes"],
    "test_captions.py::test_a_run_on_videos_trains_what_embeddings_in_memory_train": ["t2v_lora"],
    "test_captions.py::test_an_interrupted_runs_file_is_used_where_it_fits": [],
    "test_dataset.py::test_the_real_clips_load": [],
    "test_exits.py::test_a_copied_status_is_of_another_run": ["-600"],
    "test_exits.py::test_the_clock_of_the_disk_decides_nothing": ["600"],
    "test_going_on.py::test_a_list_of_absolute_paths_may_move_with_its_folder": [],
    "test_going_on.py::test_a_renamed_repository_and_a_folder_are_one_model": [],
    "test_going_on.py::test_a_run_a_checkpoint_and_the_folder_itself_name_it": ["", "checkpoint-1/transformer"],
    "test_going_on.py::test_a_run_goes_on_after_its_data_moved": ["moved-prepared", "linked-prepared"],
    "test_going_on.py::test_a_run_goes_on_with_a_model_of_the_same_content": [
        "saved_again-more1-prepared",
        "as_variant-more2-prepared",
    ],
    "test_going_on.py::test_a_run_without_hashes_goes_on_and_one_line_says_so": ["both"],
    "test_going_on.py::test_a_transformer_of_another_kind_or_size_is_refused": [
        "5b-i2v-change0-in_channels 32, not 16",
        "5b-change3-num_layers 3, not 2",
    ],
    "test_going_on.py::test_streamed_weights_and_the_plan_are_of_that_transformer": [],
    "test_going_on.py::test_the_card_tells_of_it_and_of_no_place": ["t2v_lora"],
    "test_going_on.py::test_the_merged_model_is_that_transformer_with_the_lora": [],
    "test_going_on.py::test_the_parts_that_a_run_depends_on_are_compared": ["vae"],
    "test_going_on.py::test_training_starts_from_that_transformer": ["t2v_lora"],
    "test_going_on.py::test_validation_and_the_held_out_loss_are_of_that_transformer": [],
    "test_hub.py::test_the_example_drops_learned_positions_as_training_did": [],
    "test_hub.py::test_the_example_of_the_card_runs_and_uses_what_was_trained": ["t2v_lora", "i2v_sft"],
    "test_levels.py::test_a_streamed_text_encoder_gives_the_same_bits": ["TransferStream-dtype1", "LateCopies-dtype0"],
    "test_levels.py::test_every_optimizer_trains_the_same_at_every_level": ["adamw", "host, gradients too"],
    "test_levels.py::test_nothing_is_left_of_a_streamed_text_encoder": [],
    "test_levels.py::test_videos_and_result_are_the_same_at_every_level": [],
    "test_lora.py::test_equal_runs_write_equal_bytes": [],
    "test_oom.py::test_one_line_says_peak_shape_and_flags": ["t2v_lora"],
    "test_oom.py::test_what_was_trained_goes_on_with_the_flag_that_makes_it_fit": ["t2v_lora"],
    "test_parity.py::test_training_feeds_what_the_pipeline_feeds": [
        "2b-base-1",
        "2b-longer-1",
        "2b-square-2",
        "5b-base-1",
        "5b-longer-1",
        "5b-square-2",
        "5b-i2v-base-1",
        "5b-i2v-longer-1",
        "5b-i2v-square-2",
        "1.5-5b-base-1",
        "1.5-5b-longer-1",
        "1.5-5b-square-2",
        "1.5-5b-i2v-base-1",
        "1.5-5b-i2v-longer-1",
        "1.5-5b-i2v-square-2",
    ],
    "test_prepare.py::test_a_killed_run_leaves_no_half_files_and_is_continued": ["6", "11"],
    "test_prepare.py::test_ranks_share_the_clips_whoever_comes_first": ["1"],
    "test_prepared.py::test_of_variants_only_the_one_that_loads_counts": ["vae"],
    "test_prepared.py::test_other_rows_leave_every_file_as_it_is": ["in front"],
    "test_prepared.py::test_whatever_left_files_behind": ["renamed"],
    "test_rehearsal.py::test_a_signal_ends_a_validation_and_the_run_with_a_checkpoint": ["2-t2v_lora"],
    "test_resume_exact.py::test_a_killed_run_ends_with_the_bytes_of_an_unbroken_one": ["i2v_lora-2-1-two-prepared-2"],
    "test_scripts.py::test_an_interrupted_run_continues_bit_for_bit": [
        "accumulation_over_buckets-t2v_lora",
        "accumulation_over_buckets-t2v_sft",
        "raw_with_flips-i2v_sft",
        "plain-t2v_lora",
    ],
    "test_scripts.py::test_data_workers_change_nothing": ["t2v_lora"],
    "test_scripts.py::test_no_step_between_logs_reads_what_it_computes": ["t2v_lora-raw", "i2v_sft-latents"],
    "test_scripts.py::test_raw_videos_equal_prepared_latents": ["t2v_lora", "i2v_lora"],
    "test_scripts.py::test_real_clips_train_raw_and_prepared": [],
    "test_scripts.py::test_training_lowers_the_loss": ["t2v_lora"],
    "test_shell.py::test_a_list_is_an_array_or_a_text_in_the_file_or_the_environment": [
        "LEARNING_RATES-array",
        "OPTIMIZERS-text",
        "WIDTH_BUCKETS-words",
        "FRAME_BUCKETS-lines",
    ],
    "test_shell.py::test_the_originals_block_of_settings_starts_the_runs_that_it_starts_there": [
        "end-t2v_lora",
        "over-i2v_lora",
        "lines-t2v_sft",
        "end-i2v_sft",
    ],
    "test_signals.py::test_a_run_that_waits_for_data_saves_and_leaves": ["t2v_lora-2"],
    "test_signals.py::test_a_signal_to_one_rank_stops_both_at_the_same_step": ["t2v_lora-1"],
    "test_streaming.py::test_evaluation_between_steps_changes_nothing": [
        "late-offload",
        "late-stream",
        "late-weights",
    ],
    "test_streaming.py::test_the_step_after_an_error_is_right": [
        "late-backward-offload",
        "late-backward-stream",
        "late-backward-weights",
        "late-forward-offload",
        "late-forward-stream",
        "late-forward-weights",
    ],
    "test_streaming.py::test_weights_in_fewer_bits_are_streamed_too": ["late-fp8", "late-int8"],
    "test_tiny_model.py::test_the_judge_reads_real_clips": ["none", "blur"],
    "test_tracking.py::test_a_damaged_record_costs_a_new_run_and_no_more": [""],
    "test_tracking.py::test_a_tracker_that_comes_later_gets_the_repeated_updates": [],
    "test_tracking.py::test_another_project_is_another_run": [],
    "test_tracking.py::test_tensorboard_goes_back_to_an_older_checkpoint": [],
    "test_tracking.py::test_tensorboard_shows_no_update_twice": ["logs-run/logs/{project}"],
    "test_tracking.py::test_wandb_gets_a_new_run_where_the_training_is_a_new_one": [],
    "test_validation.py::test_a_slow_rank_and_a_failing_one_do_not_end_the_run": [],
    "test_validation.py::test_images_are_fetched_once": [],
    "test_validation.py::test_sage_attention_renders_and_never_trains": [],
    "test_validation.py::test_the_held_out_loss_falls_on_what_is_trained": [],
    "test_validation.py::test_the_held_out_loss_is_the_same_in_every_setting": ["i2v_sft"],
    "test_validation.py::test_the_noise_is_the_same_at_every_validation": ["t2v_lora"],
    "test_validation.py::test_the_untrained_model_is_left_out_where_asked": [],
    "test_validation.py::test_training_does_not_notice": ["i2v_sft"],
    "test_validation.py::test_videos_and_prompts_are_written_at_the_start_in_between_and_at_the_end": ["t2v_lora"],
    "test_zero.py::test_a_longer_run_continues_bit_for_bit": [],
    "test_zero.py::test_deepspeed_is_loaded_where_it_is_asked_for_alone": [],
    "test_zero.py::test_updates_are_those_of_adamw": [],
}


def parts_of(nodeid: str) -> tuple[str, str]:
    """(test_x.py::test_y, case) of tests/test_x.py::test_y[case]."""
    head, _, case = nodeid.partition("[")
    return head.rpartition("/")[2], case.removesuffix("]")


def is_left_to_test_all(nodeid: str) -> bool:
    """Whether the test of this id is one of the other cases."""
    name, case = parts_of(nodeid)
    return name in FEW and case not in FEW[name]


def check_few_cases(nodeids: list[str]) -> None:
    """ValueError for a case of FEW that the collected file does not have: it would be run nowhere in `make test`."""
    found = {parts_of(nodeid) for nodeid in nodeids}
    files = {name.partition("::")[0] for name, _ in found}
    wanted = {(name, case) for name in FEW if name.partition("::")[0] in files for case in FEW[name]}
    if wanted - found:
        raise ValueError(f"few_cases.py names no case of a test: {sorted(wanted - found)}")
