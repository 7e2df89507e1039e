# Targets of the hardware, to be included by the Makefile. PYTHON is the interpreter that has dybit[rtl].
PYTHON ?= python3

.PHONY: rtl verilate synth
rtl: ## accelerator.v, 16 x 16
	$(PYTHON) -c "from dybit.rtl import rtl_command; print(rtl_command('accelerator.v', rows=16, columns=16))"

verilate: ## real layer tiles through Verilator against the integer model (verilator, g++)
	$(PYTHON) hardware/verilate.py

synth: ## area and timing tables (yosys, opensta, qflow-tech-osu018)
	$(PYTHON) hardware/synthesize.py
