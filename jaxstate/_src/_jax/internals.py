"""What jaxstate uses of JAX's internals, apart from what it replaces (`hooks.TABLE`).

``python -m jaxstate_tests.internals`` writes `USED`: for each name the versions that have it (all,
if there is nothing in front of the colon), and behind the colon the parameters, if it is a function
that is written in Python.
"""

__all__ = ["MEMBERS", "USED"]

# Of classes: what is used of their instances.
MEMBERS: dict[str, tuple[str, str]] = {
    "jax._src.core:Primitive": (
        "", "bind bind_with_trace def_abstract_eval def_bind_with_trace def_impl"
    ),
    "jax._src.core:Trace": ("", "invalidate process_primitive"),
    "jax._src.core:Tracer": ("", "__getitem__ _contents aval full_lower get_referent"),
    "jax._src.core:Jaxpr": ("", "constvars debug_info effects eqns invars is_high outvars"),
    "jax._src.core:JaxprEqn": ("", "effects invars outvars params primitive replace source_info"),
    "jax._src.core:DebugInfo": ("", "arg_names func_src_info result_paths traced_for"),
    "jax._src.core:ShapedArray": (
        "", "dtype mat memory_space shape sharding str_short to_tangent_aval update weak_type"
    ),
    "jax._src.interpreters.partial_eval:DynamicJaxprTrace": (
        "", "default_process_primitive emit_eqn new_const to_jaxpr_tracer var_to_tracer"
    ),
    "jax._src.interpreters.partial_eval:JaxprStackFrame": ("", "newvar tracing_eqns"),
    "jax._src.interpreters.partial_eval:TracingEqn": ("", "effects outvars primitive"),
    "jax._src.interpreters.partial_eval:DynamicJaxprTracer": ("", "val"),
    "jax._src.interpreters.partial_eval:JaxprTracer": ("", "pval"),
    "jax._src.interpreters.ad:JVPTracer": ("", "primal tangent"),
    "jax._src.interpreters.ad:LinearizeTracer": ("", "primal tangent"),
    "jax._src.interpreters.batching:BatchTracer": ("", "batch_dim val"),
    "jax._src.linear_util:WrappedFun": ("", "call_wrapped debug_info f stores transforms"),
    "jax._src.pjit:PjitParams": ("", "arg_names consts in_avals out_tree params"),
    "jax._src.pjit:PjitInfo": ("", "static_argnames static_argnums"),
    "jax._src.stages:Compiled": ("", "donate_argnums"),
    "jax._src.stages:Traced": ("", "jaxpr lower out_tree"),
}  # fmt: skip

USED: dict[str, dict[str, str]] = {
    "jax._src.ad_checkpoint": {
        "RematTraced": ": ",
        "remat_p": ": ",
    },
    "jax._src.ad_util": {
        "Zero": ": ",
    },
    "jax._src.api": {
        "_jvp": ": fun, primals, tangents, has_aux",
    },
    "jax._src.api_util": {
        "resolve_kwargs": ": fun, args, kwargs",
    },
    "jax._src.array": {
        "ArrayImpl": ": ",
    },
    "jax._src.compute_on": {
        "compute_on_p": ": ",
    },
    "jax._src.config": {
        "_check_vma": ": ",
        "check_tracer_leaks": ": ",
        "debug_key_reuse": ": ",
        "enable_x64": ": ",
        "explicit_x64_dtypes": ": ",
        "no_tracing": ": ",
        "trace_context": ": ",
    },
    "jax._src.core": {
        "AbstractValue": ": ",
        "ClosedJaxpr": "<0.12: ",
        "InconclusiveDimensionOperation": ": ",
        "Jaxpr": ": ",
        "Primitive": ": ",
        "ShapedArray": ": ",
        "Trace": ": ",
        "Tracer": ": ",
        "Var": ": ",
        "axis_env_state": ": ",
        "canonicalize_slice": ": s, axis_size",
        "closed_call_p": ": ",
        "config_ext": ": ",
        "current_jaxpr_eqn_context": ": ",
        "definitely_equal": ": x, y",
        "dimension_as_value": ": d",
        "divide_shape_sizes": ": s1, s2",
        "eval_jaxpr": ": jaxpr, consts, propagate_source_info, *args",
        "eval_jaxpr_p": ">=0.11: ",
        "eval_trace": ": ",
        "full_lower": ": val",
        "is_concrete": ": x",
        "is_symbolic_dim": ": v",
        "jaxprs_in_params": ": params",
        "modify_spec_for_auto_manual": ": spec, mesh",
        "new_jaxpr_eqn": ": invars, outvars, primitive, params, effects, source_info, ctx",
        "pvary": ": x, axis_name",
        "pytype_aval_mappings": ": ",
        "set_current_trace": ": ",
        "shaped_abstractify": ": x",
        "to_concrete_value": ": x",
        "top_axis_env": ": ",
        "trace_ctx": ": ",
        "trace_state_clean": ": ",
        "trace_state_strong_ref": ": ",
        "typematch": ": t1, t2, no_dtype_check",
        "typeof": ": x",
    },
    "jax._src.custom_batching": {
        "ClosedRule": ": ",
        "custom_vmap_p": ": ",
    },
    "jax._src.custom_derivatives": {
        "SymbolicZero": ": ",
        "custom_jvp": ": ",
        "custom_jvp_call_p": ": ",
        "custom_vjp_call_p": ": ",
        "linear_call_p": ": ",
        "remat_opt_p": ": ",
    },
    "jax._src.dispatch": {
        "device_put_p": ": ",
    },
    "jax._src.dtypes": {
        "canonicalize_value": ": ",
        "float0": ": ",
        "issubdtype": ": a, b",
        "prng_key": ": ",
        "register_canonicalize_value_handler": ": ",
    },
    "jax._src.effects": {
        "Effect": ": ",
        "control_flow_allowed_effects": ": ",
        "custom_derivatives_allowed_effects": ": ",
        "remat_allowed_effects": ": ",
    },
    "jax._src.flattree": {
        "flatten": ">=0.11: tree, is_leaf, registry",
        "nones": ">=0.11: n",
        "pack": ">=0.11: tree",
    },
    "jax._src.hijax": {
        "HiPrim": ">=0.11: ",
        "VJPHiPrimitive": "<0.11: ",
        "call_hi_primitive_p": ": ",
        "custom_jvp3": ">=0.11: ",
        "custom_vjp3": ": ",
    },
    "jax._src.indexing": {
        "Slice": ": ",
    },
    "jax._src.interpreters.ad": {
        "CustomBwdWithAccums": ">=0.12: ",
        "JVPTrace": ": ",
        "JVPTracer": ": ",
        "LinearizeTrace": ": ",
        "LinearizeTracer": ": ",
        "instantiate_zeros": ": tangent",
        "primitive_jvps": ": ",
    },
    "jax._src.interpreters.batching": {
        "BatchTrace": ": ",
        "BatchTracer": ": ",
        "bdim_at_front": ": x, bdim, size, mesh_axis",
        "defvectorized": ": prim",
    },
    "jax._src.interpreters.mlir": {
        "register_lowering": ": prim, rule, platform, inline, cacheable",
    },
    "jax._src.interpreters.partial_eval": {
        "DynamicJaxprTrace": ": ",
        "DynamicJaxprTracer": ": ",
        "JaxprTrace": ": ",
        "JaxprTracer": ": ",
        "const_fold_rules": ": ",
        "dce_jaxpr_consts": ": jaxpr, used_outputs, instantiate",
        "forwarding_rules": ": ",
    },
    "jax._src.interpreters.pxla": {
        "JitGlobalCppCacheKeys": ": ",
        "cc_shard_arg": ": x, sharding, layout",
    },
    "jax._src.lax.control_flow.conditionals": {
        "cond_p": ": ",
    },
    "jax._src.lax.control_flow.loops": {
        "Scan3": ": ",
        "scan_p": ": ",
        "while_p": ": ",
    },
    "jax._src.lax.control_flow.solves": {
        "CustomRoot": ">=0.11: ",
        "_RootLinearMap": ">=0.11: ",
        "linear_solve_p": ": ",
    },
    "jax._src.lax.lax": {
        "_convert_element_type": (
            ": operand, new_dtype, weak_type, sharding, warn_on_complex_to_real_cast"
        ),
        "broadcast_in_dim": ": operand, shape, broadcast_dimensions, out_sharding",
        "convert_element_type_p": ": ",
        "copy_p": ": ",
    },
    "jax._src.linear_util": {
        "wrap_init": ": f, params, debug_info",
    },
    "jax._src.mesh": {
        "empty_abstract_mesh": ": ",
        "get_abstract_mesh": ": ",
        "get_concrete_mesh": ": ",
        "use_abstract_mesh": ": ",
    },
    "jax._src.nn.functions": {
        "": ": ",
    },
    "jax._src.nn.initializers": {
        "": ": ",
    },
    "jax._src.pjit": {
        "PjitParams": ": ",
        "_cpp_pjit": ": fun, jit_info",
        "_cpp_pjit_cache_fun_only": ": ",
        "_get_fastpath_data": (
            ": executable, out_tree, args_flat, out_flat, effects, consts_for_constvars, "
            "pgle_profiler, const_args"
        ),
        "_infer_params": ": fun, ji, args, kwargs",
        "_jax": ": ",
        "_need_to_rebuild_with_fdo": ": pgle_profiler",
        "_run_python_pjit": ": p, args_flat, fun, args, kwargs",
        "jit_p": ": ",
        "program_order_p": ">=0.11 <0.12: ",
        "reshard": ": xs, out_shardings",
    },
    "jax._src.program_order": {
        "program_order_p": ">=0.12: ",
    },
    "jax._src.shard_map": {
        "_RepError": ": ",
        "_SpecError": ": ",
        "shard_map_p": ": ",
    },
    "jax._src.sharding_impls": {
        "UNSPECIFIED": ": ",
    },
    "jax._src.source_info_util": {
        "current": ": ",
        "is_user_filename": ": filename",
        "register_exclusion": ": path",
        "summarize": ": source_info, num_frames",
    },
    "jax._src.stages": {
        "Compiled": ": ",
        "Traced": ": ",
    },
    "jax._src.traceback_util": {
        "api_boundary": ": fun, repro_api_name, repro_user_func",
        "register_exclusion": ": path",
    },
    "jax._src.tree_util": {
        "FlatTree": "<0.11: ",
        "dispatch_registry": ": ",
        "tracing_registry": ": ",
    },
    "jax._src.util": {
        "register_cache": ": cache, for_what",
        "weakref_lru_cache": ": f, maxsize, trace_context_in_key, explain",
    },
    "jax._src.xla_metadata": {
        "xla_metadata_call_p": ">=0.11: ",
    },
}
