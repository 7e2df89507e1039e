import tomllib

import pytest
from hostile_json import mutated
from hypothesis import HealthCheck, given, settings

from dybit.accelerator import Config, EnergyTable
from dybit.accelerator.energy import EVENTS
from dybit.errors import DyBitError


class TestConfig:
    def test_toml_gives_the_config_back(self, tmp_path):
        table = EnergyTable.of({event: 1e-12 * (i + 1) for i, event in enumerate(EVENTS)})
        config = Config(rows=8, dram_bytes_per_cycle=12.5, fuse="together", narrowest=4, energy=table)
        assert Config.from_toml(config.to_toml()) == config
        (tmp_path / "accel.toml").write_text(Config(columns=16).to_toml(), encoding="utf-8")
        assert Config.load(tmp_path / "accel.toml") == Config(columns=16)
        assert Config.from_toml("") == Config()

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("rows = 0", "rows must be a positive integer, not 0"),
            ("columns = 2.5", "columns must be a positive integer, not 2.5"),
            ("row = 8", "config has the unknown name 'row'; did you mean 'rows'"),
            ("rows = ", "config is not TOML"),
            ("frequency = 0", "frequency must be a positive finite number, not 0"),
            ("dram_bytes_per_cycle = inf", "dram_bytes_per_cycle must be a positive finite number, not inf"),
            ("schedule = 'os'", "schedule must be one of jit, scalesim, not 'os'"),
            ("narrowest = 3", "narrowest must be one of 2, 4, 8, not 3"),
            ("pack_depthwise = 1", "pack_depthwise must be true or false, not 1"),
            ("weight_sram = 4096", "weight_sram must hold two tiles of weights, 8192 bytes for 32 x 32, not 4096"),
            ("sum_sram = 100", "sum_sram must hold one row of partial sums, 544 bytes for 32 x 32, not 100"),
            ("activation_sram = 32", "activation_sram must hold two rows of activations, 64 bytes"),
            ("energy = 3", "energy must be a table of costs, not 3"),
            ("[energy]\ndrambit = 3", "unknown name 'drambit'; did you mean 'dram_bit'"),
        ],
    )
    def test_bad_configs_get_one_clear_error(self, text, words):
        with pytest.raises(DyBitError, match=words):
            Config.from_toml(text)

    def test_files(self, tmp_path):
        with pytest.raises(DyBitError, match="config must be a readable TOML file"):
            Config.load(tmp_path / "none.toml")


def test_malformed_parameters_are_one_sentence(monkeypatch):
    good = tomllib.loads(Config().to_toml()) | {"energy": {"mac_w8a8": 1e-12, "dram_bit": 1.0}}
    refused = []

    @settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(data=mutated(good))
    def check(data):
        if not isinstance(data, dict):
            return  # TOML is a table
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tomllib, "loads", lambda _: data)
            try:
                config = Config.from_toml("")
            except DyBitError as error:
                refused.append(str(error))
                assert "\n" not in str(error) and len(str(error)) < 1000
                return
        assert Config.from_toml(config.to_toml()) == config

    check()
    assert len(set(refused)) > 50
