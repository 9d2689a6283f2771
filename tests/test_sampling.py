import math

import pytest

from wavelatent.common.errors import UsageError
from wavelatent.stage2_diffusion.sampling import Sampling


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampler": "hune"}, "choose one of heun"),
        ({"grid": "cosine"}, "choose one of karras"),
        ({"steps": 0}, "at least 1 step"),
        ({"rho": 0.0}, "rho"),
        ({"grid": "shifted", "grid_shift": -1.0}, "grid_shift"),
        ({"grid_shift": 3.0}, "take grid shifted"),
        ({"grid": "uniform", "rho": 5.0}, "take grid karras"),
        ({"eta": 0.5}, "take sampler ddim or dpmpp_2m_sde"),
        ({"sampler": "ddim", "eta": 1.5}, "between 0 and 1"),
        ({"sampler": "dpmpp_2m_sde", "eta": -0.5}, "at least 0"),
        ({"sampler": "euler", "churn": 1.0}, "take sampler heun"),
        ({"churn": -1.0}, "churn"),
        ({"churn": 1.0, "churn_min": 3.0, "churn_max": 2.0}, "churn"),
        ({"churn": 1.0, "churn_noise": math.nan}, "churn_noise"),
        ({"guidance": -1.0}, "at least 0"),
        ({"guidance": math.nan}, "guidance"),
        ({"guidance": 2.0, "guidance_interval": (2.0, 1.0)}, "interval"),
        ({"guidance_interval": (0.2, 5.0)}, r"guidance_interval \(0.2, 5.0\) .* take a guidance other than 1"),
    ],
)
def test_what_does_not_go_together_is_refused_with_the_fix(settings, message):
    with pytest.raises(UsageError, match=message):
        Sampling(**settings)


def test_every_sampler_gets_its_own_options():
    assert Sampling("heun", churn=3.0, churn_max=9.0).sampler_options() == {
        "churn": 3.0,
        "churn_min": 0.0,
        "churn_max": 9.0,
        "churn_noise": 1.0,
    }
    assert Sampling(sampler="ddim", eta=0.3).sampler_options() == {"eta": 0.3}
    assert Sampling(sampler="dpmpp_2m_sde").sampler_options() == {}
    assert Sampling(sampler="dpmpp_2m").sampler_options() == {}
