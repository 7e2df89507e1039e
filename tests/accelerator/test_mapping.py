from dybit.accelerator import Config
from dybit.accelerator.datapath import PIPE, mode
from dybit.accelerator.mapping import map_layer
from dybit.accelerator.simulate import layer_cost
from dybit.workloads.workload import Conv, Gemm


class TestMapping:
    def test_depthwise_groups_share_the_array_on_its_diagonal(self):
        conv = Conv("dw", 32, 32, (14, 14), (3, 3), padding=(1, 1), groups=32)
        packed = map_layer(conv, mode(8, 8), Config())
        assert (packed.packed, packed.folds) == (3, 11)  # 32 rows hold three kernels of nine
        assert map_layer(conv, mode(8, 8), Config(pack_depthwise=False)).folds == 32

    def test_attention_products_are_not_packed_and_use_activation_bits_on_both_sides(self):
        product = Gemm("scores", 197, 64, 197, 12, dynamic=True)
        assert map_layer(product, mode(8, 8), Config(rows=256, columns=512, weight_sram=1 << 20)).packed == 1
        cost = layer_cost(product, (2, 8), Config())
        assert cost == layer_cost(product, (8, 8), Config())
        assert cost.bits == (8, 8)

    def test_rows_are_cut_where_partial_sums_do_not_fit(self):
        config = Config(rows=4, columns=4, sum_sram=50 * 4 * 17)  # 50 rows of 136 bits in 4 columns
        assert config.sum_rows == 50
        cost = layer_cost(Gemm("g", 130, 16, 8), (8, 8), config)
        assert cost.traffic.tiles >= 3
        assert cost.folds == 4 * 2 * cost.traffic.tiles

    def test_a_narrow_weight_port_makes_folds_wait(self):
        layer = Gemm("g", 1, 64, 64)
        fast, slow = (layer_cost(layer, (2, 2), Config(weight_port=port)).compute_cycles for port in (32, 8))
        assert (fast, slow) == (1 + 64 + PIPE, 1 + 64 + PIPE)  # one fold only
        layer = Gemm("g", 1, 1024, 64)
        fast, slow = (layer_cost(layer, (2, 2), Config(weight_port=port)).compute_cycles for port in (32, 8))
        assert (fast, slow) == (7 * 32 + 1 + 64 + PIPE, 7 * 128 + 1 + 64 + PIPE)

    def test_narrow_codes_ride_in_containers_and_save_traffic(self):
        layer = Gemm("g", 64, 64, 64)
        three, four = layer_cost(layer, (3, 3), Config()), layer_cost(layer, (4, 4), Config())
        assert three.compute_cycles == four.compute_cycles
        assert three.traffic.weights == 64 * 64 * 3 // 8 < four.traffic.weights
        promoted = layer_cost(layer, (8, 4), Config())
        assert promoted.compute_cycles == layer_cost(layer, (8, 8), Config()).compute_cycles
        assert promoted.traffic.inputs == four.traffic.inputs
