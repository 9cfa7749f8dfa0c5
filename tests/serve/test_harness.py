"""The evaluation harness gets the same scores over HTTP as from the model itself."""

import numpy as np
import pytest

from tests.helpers import served

lm_eval = pytest.importorskip("lm_eval")


@pytest.mark.parametrize("random_padding", [True, False])
def test_local_completions_gives_the_scores_of_blocktx(random_padding, monkeypatch):
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from blocktx.lm_eval import model as module

    engine = served.engine(served.model(), random_padding=random_padding)
    monkeypatch.setattr(module, "load", lambda checkpoint: engine)
    ours = module.HarnessModel("checkpoint", batch_size=4)
    pairs = [
        ("the block token decoder", " a cache of blocks"),
        ("token by token, a cache of", " blocks"),
        ("token by token, a cache of", " tokens by token, and so on to the end"),
        ("é\n token by token", " the"),
    ]
    if random_padding:  # without, the server cannot know how much padding a short context gets
        pairs += [("a cache", " of blocks"), ("", "the block token decoder")]

    def requests():
        return [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]

    wanted = ours.loglikelihood(requests())
    with served.serving(engine) as live:
        theirs = LocalCompletionsAPI(
            model="tiny",
            base_url=f"{live.url}/v1/completions",
            max_length=120,
            batch_size=3,
        )
        assert theirs.tokenizer_backend == "remote"
        got = theirs.loglikelihood(requests())
        prompts = [
            Instance("generate_until", {}, ("the block", {"until": ["e"], "max_gen_toks": 9}), 0)
        ]
        assert theirs.generate_until(prompts) == ours.generate_until(prompts)
    np.testing.assert_allclose([x for x, _ in got], [x for x, _ in wanted], atol=1e-4)
    assert [x for _, x in got] == [x for _, x in wanted]
