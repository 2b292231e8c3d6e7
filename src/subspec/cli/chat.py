"""``subspec chat``: opens the model and hands over to the conversation of ``subspec.chat``."""

from subspec.cli import options
from subspec.cli.answer import summary_line
from subspec.cli.progress import TerminalProgress


def chat(
    model: options.Model,
    memory: options.Memory = "auto",
    vram: options.Vram = None,
    ram: options.Ram = None,
    device: options.DeviceChoice = options.Device.AUTO,
    context: options.Context = None,
    max_new_tokens: options.MaxNewTokens = 1024,
    temperature: options.Temperature = None,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    min_p: options.MinP = 0.0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    seed: options.Seed = 0,
    stop: options.Stop = None,
    system: options.System = None,
    mode: options.DecodeMode = options.Mode.SPECULATIVE,
    depth: options.Depth = None,
    width: options.Width = None,
    nodes: options.Nodes = None,
    min_reach: options.MinReach = None,
    draft_temperature: options.DraftTemperature = None,
    dtype: options.Dtype = None,
    stream: options.Stream = None,
    paranoid: options.Paranoid = False,
    store: options.Store = None,
) -> None:
    """Talk with a model.  /help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves."""
    from subspec.chat import Chat

    engine = {
        "memory": memory,
        "vram": vram,
        "ram": ram,
        "device": device.value,
        "context": context,
        "mode": mode.value,
        "dtype": dtype,
        "stream": stream,
        "paranoid": paranoid,
        "store": store,
    }
    tree = {
        "depth": depth,
        "width": width,
        "nodes": nodes,
        "min_reach": min_reach,
        "draft_temperature": draft_temperature,
    }
    params = options.sampling(
        max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        repetition_penalty=repetition_penalty, seed=seed, stop=stop,
    )  # fmt: skip
    with (
        TerminalProgress() as progress,
        options.open_llm(model, progress, **engine, **tree) as llm,
    ):
        budgets = llm.plan.budgets
        Chat(
            llm,
            params,
            system=system,
            summarize=lambda result: summary_line(result, budgets),
        ).run()
