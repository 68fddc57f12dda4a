"""Which bodies are run at all: those that name nothing but what such a function needs.

A function's own words, torch's functions over tensors and plain Python are written down here, and nothing else is let
in. What a body calls by name is looked up as the compiler sees it (symtable), scope by scope, for a name that is local
in one scope is global in the next. This keeps a body from the tests, which run in the same process; the machine is
protected by cage.py.
"""

import ast
import symtable
import textwrap

import source

BUILTINS = {"abs", "all", "any", "bool", "dict", "divmod", "enumerate", "filter", "float", "frozenset", "int",
            "isinstance", "iter", "len", "list", "map", "max", "min", "next", "pow", "print", "range", "repr",
            "reversed", "round", "set", "slice", "sorted", "str", "sum", "tuple", "zip", "Exception", "AssertionError",
            "AttributeError", "IndexError", "KeyError", "NotImplementedError", "RuntimeError", "TypeError",
            "ValueError", "ZeroDivisionError"}
MODULES = {"torch", "nn", "F", "functional", "math", "rearrange", "reduce", "repeat", "einsum"}  # where a file has them
CONTAINERS = set("""append clear copy count difference discard extend get index insert intersection issubset items join
    keys lower pop popleft appendleft remove replace reverse rotate setdefault sort split startswith endswith strip
    start step stop union update upper values""".split())
TORCH = set("""nn functional linalg
    float16 bfloat16 float32 float64 int8 int16 int32 int64 uint8 bool complex64 complex128 long double float half int
    pi inf nan e tau isqrt comb gcd prod
    tensor as_tensor zeros ones empty full eye arange linspace logspace zeros_like ones_like empty_like full_like
    new_zeros new_ones new_full new_tensor new_empty rand randn randint randperm rand_like randn_like bernoulli
    no_grad enable_grad inference_mode set_grad_enabled grad grad_fn backward detach detach_ requires_grad
    requires_grad_ retain_grad is_leaf data item tolist
    shape size numel dim ndim dtype device to type_as is_floating_point is_complex is_contiguous contiguous clone
    view view_as reshape reshape_as flatten unflatten squeeze unsqueeze squeeze_ unsqueeze_ transpose swapaxes permute
    movedim moveaxis T mT H mH t expand expand_as broadcast_to broadcast_tensors repeat repeat_interleave tile flip
    fliplr flipud roll rot90 narrow select index_select gather take take_along_dim scatter scatter_ scatter_add
    scatter_add_ scatter_reduce index_add index_add_ index_copy index_copy_ index_fill index_put index_put_
    masked_fill masked_fill_ masked_select masked_scatter where nonzero argwhere unbind unfold fold chunk split
    tensor_split cat concat concatenate stack hstack vstack dstack meshgrid cartesian_prod combinations diag diagonal
    diag_embed diagflat tril triu tril_ triu_ pad
    abs add sub mul div neg pow sqrt rsqrt square exp expm1 exp2 log log2 log10 log1p sin cos tan asin acos atan atan2
    sinh cosh tanh sigmoid erf erfc erfinv sign sgn floor ceil round trunc frac fmod remainder floor_divide true_divide
    divide multiply subtract reciprocal clamp clamp_min clamp_max clip lerp hypot addcmul addcdiv nan_to_num heaviside
    abs_ add_ sub_ mul_ div_ neg_ pow_ sqrt_ rsqrt_ square_ exp_ log_ clamp_ clamp_min_ clamp_max_ lerp_ round_ floor_
    copy_ fill_ zero_ addcmul_ addcdiv_ normal_ uniform_ sigmoid_ tanh_
    eq ne lt le gt ge equal allclose isclose isnan isinf isfinite isin logical_and logical_or logical_not logical_xor
    bitwise_and bitwise_or bitwise_not maximum minimum fmax fmin
    sum mean std var var_mean std_mean median nanmedian quantile mode prod nansum nanmean max min amax amin aminmax
    argmax argmin argsort sort topk kthvalue cumsum cumprod cummax cummin logsumexp logcumsumexp norm dist any all
    count_nonzero unique unique_consecutive bincount histc searchsorted bucketize diff cov corrcoef trapezoid
    indices values solution eigenvalues eigenvectors
    matmul mm bmm mv dot vdot inner outer ger addmm baddbmm addmv addr einsum tensordot kron cross trace cdist pdist
    det logdet slogdet inv inverse pinv matrix_power matrix_exp solve solve_triangular lstsq eig eigh eigvals eigvalsh
    svd svdvals qr cholesky lu matrix_norm vector_norm matrix_rank multi_dot
    conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d linear bilinear avg_pool1d avg_pool2d
    avg_pool3d max_pool1d max_pool2d max_pool3d adaptive_avg_pool2d adaptive_avg_pool3d interpolate grid_sample
    affine_grid pixel_shuffle pixel_unshuffle relu gelu silu elu selu leaky_relu softplus softmax log_softmax normalize
    layer_norm group_norm batch_norm instance_norm cosine_similarity pairwise_distance l1_loss mse_loss smooth_l1_loss
    huber_loss cross_entropy binary_cross_entropy kl_div scaled_dot_product_attention one_hot embedding dropout
    modules named_modules children named_children parameters named_parameters weight bias""".split())
FORBIDDEN = (ast.Import, ast.ImportFrom, ast.ClassDef, ast.Global, ast.AsyncFunctionDef, ast.Await, ast.Match,
             *([ast.TypeAlias] if hasattr(ast, "TypeAlias") else []))


def refusals(body: list[ast.stmt], function: ast.FunctionDef, original: ast.Module, graded: list[str]) -> list[str]:
    """Why a body is not run: one line for each thing in it that such a body has no business with. `function` is the
    original's, in the module `original`; `graded` names this assignment's functions in that file."""
    bodies = [source.find(original, name) for name in graded]
    others = {f.name for f in bodies if f is not function} - words(function) - attributes(function)  # no circles
    modules = {name for statement in original.body for name in bound(statement)} & MODULES
    names = (set().union(*map(words, bodies)) | modules | BUILTINS) - others
    readable = (set().union(*map(attributes, bodies)) | TORCH | CONTAINERS) - others
    settable = attributes(function, ast.Store, ast.Del)
    wrong = []
    for node in (n for s in body for n in ast.walk(s)):
        if isinstance(node, FORBIDDEN):
            wrong.append(f"{type(node).__name__} is not for these functions")
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and node.attr not in readable:
            wrong.append(f"the attribute .{node.attr} is not available")
        elif isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load) and node.attr not in settable:
            wrong.append(f"the attribute .{node.attr} must not be set")
    try:
        wrong += [f"the name {name} is not available" for name in sorted(globals_of(body, function) - names)]
    except SyntaxError as error:
        wrong.append(f"it cannot be compiled: {error.msg}")
    return list(dict.fromkeys(wrong))


def words(function: ast.FunctionDef) -> set[str]:
    """The names that the body of one of our functions takes from its module or from Python."""
    return globals_of(source.statements(function), function)


def globals_of(body: list[ast.stmt], function: ast.FunctionDef) -> set[str]:
    """What a body with this function's arguments finds outside of itself, in whichever scope; dunders count too."""
    arguments = ", ".join(n.arg for n in ast.walk(function.args) if isinstance(n, ast.arg))
    text = f"def alone({arguments}):\n" + textwrap.indent("\n".join(map(ast.unparse, body)) or "pass", "    ")
    tables = symtable.symtable(text, "body", "exec").get_children()
    found = set()
    while tables:
        table = tables.pop()
        tables += table.get_children()
        found |= {s.get_name() for s in table.get_symbols() if s.is_global() or s.get_name().startswith("__")}
    return found


def attributes(function: ast.FunctionDef, *kinds: type) -> set[str]:
    """The names after dots in the body of one of our functions; only those in these contexts where some are given."""
    nodes = [n for s in source.statements(function) for n in ast.walk(s) if isinstance(n, ast.Attribute)]
    return {n.attr for n in nodes if not kinds or isinstance(n.ctx, kinds)}


def bound(statement: ast.stmt) -> list[str]:
    """The names that an import at the top of a module gives to it."""
    if not isinstance(statement, (ast.Import, ast.ImportFrom)):
        return []
    return [(alias.asname or alias.name).split(".")[0] for alias in statement.names]
