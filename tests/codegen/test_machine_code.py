"""The reader of machine code, on short pieces written for it."""

import pytest

from svdquant_pack.tests.codegen import layout
from svdquant_pack.tests.codegen import machine_code as mc

# a main loop whose wait has been moved behind the end, in a loop over tiles with an instruction of its own
SASS = """
.text.kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_8:
        /*0010*/                   S2R R0, SR_CTAID.X ;
.L_x_7:
        /*0020*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR11], R2 ;
        /*0030*/              @!P0 BRA `(.L_x_5) ;
.L_x_9:
        /*0040*/                   IGMMA.64x128x32.S8.S8 R88, gdesc[UR24], R88 ;
        /*0050*/                   IGMMA.64x128x32.S8.S8 R24, gdesc[UR20], R24, gsb0 ;
        /*0060*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*0070*/               @P0 BRA `(.L_x_7) ;
        /*0080*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0090*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR24], R24 ;
        /*00a0*/                   CALL.REL.NOINC `($__internal_0_$__cuda_sm20_div_rn_f32) ;
        /*00b0*/              @!P0 BRA `(.L_x_8) ;
        /*00c0*/                   EXIT ;
.L_x_5:
        /*00d0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR11], R2 ;
        /*00e0*/              @!P0 BRA `(.L_x_5) ;
        /*00f0*/                   BRA `(.L_x_9) ;
.L_x_10:
        /*0100*/                   BRA `(.L_x_10);
"""


def test_the_main_loop_includes_its_wait_behind_the_end_and_nothing_of_the_outer_loop():
    loop = mc.main_loop(mc.parse(SASS), "IGMMA")
    assert [line.mnemonic.split(".")[0] for line in loop] == [
        *("SYNCS", "BRA", "IGMMA", "IGMMA", "WARPGROUP", "BRA"),
        *("SYNCS", "BRA", "BRA"),
    ]
    assert mc.tensor_core(loop) == {"IGMMA.64x128x32.S8.S8": 2}


def test_the_wait_that_leaves_a_group_in_flight_is_told_from_the_one_that_does_not():
    assert mc.leaves_in_flight(mc.main_loop(mc.parse(SASS)))
    assert not mc.leaves_in_flight(mc.main_loop(mc.parse(SASS.replace("0x1 ;", "0x0 ;"))))


def test_a_division_or_a_check_of_tensor_memory_is_not_emulation():
    assert mc.emulation_calls(mc.parse(SASS)) == []
    check = SASS.replace("sm20_div_rn_f32", "sm10x_tcgen05_guardrail_trap_unallocated_columns_being_dealloced")
    assert mc.emulation_calls(mc.parse(check)) == []


def test_an_emulated_instruction_is_found_and_a_jump_written_as_a_call_is_not():
    name = "$__internal_0_$__cuda_sm_9x_mma_sub_byte_internal_m16n8k64_s4_s4"
    text = f"""
        /*0000*/                   CALL.REL.NOINC `({name}) ;
.L_x_1:
        /*0010*/              @!P0 CALL.REL.NOINC `(.L_x_0) ;
        /*0020*/                   BRA `(.L_x_1) ;
.L_x_0:
        /*0030*/                   EXIT ;
{name}:
        /*0040*/                   RET.REL.NODEC R100 `(kernel) ;
"""
    code = mc.parse(text)
    assert mc.emulation_calls(code) == [name]
    assert len(mc.main_loop(code)) == 2


def test_of_two_loops_the_one_with_the_expected_instruction_is_the_main_one():
    def loop(label: str, name: str) -> str:
        return f".L_x_{label}:\n        /*0000*/    {name} R0, R1, R2 ;\n        /*0010*/  @P0 BRA `(.L_x_{label}) ;\n"

    code = mc.parse(loop("1", "HMMA.16816.F32") + loop("2", "IMMA.16864.S4.S4"))
    assert mc.main_loop(code, "IMMA")[0].mnemonic.startswith("IMMA")
    assert mc.main_loop(code, "HMMA")[0].mnemonic.startswith("HMMA")


def test_without_a_loop_everything_counts_and_without_tensor_cores_the_longest_loop():
    assert len(mc.main_loop(mc.parse("        /*0000*/    FADD R0, R1, R2 ;\n        /*0010*/    EXIT ;\n"))) == 2
    assert mc.main_loop(mc.parse("")) == ()


def test_amd_assembly():
    text = """
	s_mov_b32 s0, 0
.LBB0_1:                                ; %loop
	v_wmma_i32_16x16x16_iu8 v[0:7], v[8:11], v[12:15], v[0:7]
	v_add_nc_u32_e32 v1, v2, v3
	s_cbranch_scc1 .LBB0_1
	s_endpgm
"""
    loop = mc.main_loop(mc.parse(text), "wmma")
    assert len(loop) == 3 and mc.kinds(loop)["tensor"] == 1 and mc.kinds(loop)["integer"] == 1


LOADS = """
.L_x_1:
        /*0000*/                   LDG.E.U8 R4, desc[UR4][R2.64] ;
        /*0010*/                   LDG.E.64 R6, desc[UR4][R2.64+0x40] ;
        /*0020*/              @!P0 LDG.E.U16.CONSTANT R9, desc[UR4][R10.64] ;
        /*0030*/                   LDGSTS.E.BYPASS.128 [R12], desc[UR4][R14.64] ;
        /*0040*/                   {} ;
        /*0050*/                   OMMA.SF.16864.F32.E2M1.E2M1.UE4M3.4X R88, R104, R120, R88, R170, R181, URZ ;
        /*0060*/                   STS.U8 [R20], R4 ;
        /*0070*/               @P0 BRA `(.L_x_1) ;
"""


def loads(between: str):
    return mc.main_loop(mc.parse(LOADS.format(between)), "OMMA")


def test_narrow_loads_are_those_of_less_than_four_bytes_from_global_memory():
    assert layout.narrow_loads(loads("NOP")) == 2


@pytest.mark.parametrize(
    ("between", "early"),
    [
        ("NOP", 0),  # R4 is stored behind the product
        ("STS.U8 [R20], R4", 1),
        ("IADD3 R21, PT, PT, R7, R9, RZ", 2),  # the second half of a load of 64 bits
        ("STS [R9], R21", 1),
        ("IMAD.WIDE R8, R5, R3, R10", 0),
        ("MOV R4, RZ ;\n        /*0041*/                   STS.U8 [R20], R4", 0),  # another number by then
        ("MOV R4, R4 ;\n        /*0041*/                   NOP", 1),
    ],
)
def test_a_load_is_early_if_it_is_read_before_the_first_tensor_core_instruction_of_its_pass(between, early):
    assert layout.early_loads(loads(between)) == early


def test_a_loop_without_tensor_cores_has_no_early_loads():
    text = LOADS.format("IADD3 R21, PT, PT, R7, R9, RZ").replace("OMMA", "FMUL")
    assert layout.early_loads(mc.main_loop(mc.parse(text))) == 0


@pytest.mark.parametrize(
    ("target", "registers", "shared", "warps", "blocks"),
    [  # worked out by hand from the CUDA programming guide's table
        ("sm_120", 200, 33792, 8, 1),  # 8 * 32 * 200 registers are 51200 of 65536
        ("sm_120", 128, 33792, 8, 2),
        ("sm_120", 129, 33792, 8, 1),  # given 136
        ("sm_120", 255, 33792, 4, 2),
        ("sm_120", 255, 50 * 1024, 4, 1),  # and 1 KiB that every block takes
        ("sm_120", 255, 49 * 1024, 4, 2),
        ("sm_80", 168, 0, 4, 3),
        ("sm_90", 32, 0, 4, 16),
        ("sm_86", 32, 0, 1, 16),
        ("sm_75", 64, 2048, 4, 8),
        ("sm_80", 72, 0, 4, 7),  # 28 warps of 2304: seven to each quarter of the registers
    ],
)
def test_resident_blocks(target, registers, shared, warps, blocks):
    assert layout.resident_blocks(target, registers, shared, warps) == blocks


def test_tensor_memory_bounds_the_blocks_of_sm_100():
    assert layout.resident_blocks("sm_100", 64, 1024, 4, tensor_memory=256) == 2


def test_instructions_per_element_count_every_innermost_loop_and_all_without_one():
    def loop(label: str, inside: str = "") -> str:
        first, last = "        /*0000*/    FADD R0, R1, R2 ;\n", f"        /*0010*/  @P0 BRA `(.L_x_{label}) ;\n"
        return f".L_x_{label}:\n{first}{inside}{last}"

    assert layout.instructions_per_element(mc.parse(loop("1") + loop("2")), 2) == 2
    assert layout.instructions_per_element(mc.parse(loop("1", loop("2"))), 2) == 1
    assert layout.instructions_per_element(mc.parse("        /*0000*/    FADD R0, R1, R2 ;\n"), 2) == 0.5


def test_a_loop_that_only_multiplies_is_not_counted_per_element():
    text = LOADS.format("NOP").replace("OMMA.SF.16864.F32.E2M1.E2M1.UE4M3.4X", "HMMA.16816.F32.BF16")
    quantizing = ".L_x_2:\n        /*0080*/    FADD R0, R1, R2 ;\n        /*0090*/  @P0 BRA `(.L_x_2) ;\n"
    assert layout.instructions_per_element(mc.parse(text + quantizing), 2) == 1
