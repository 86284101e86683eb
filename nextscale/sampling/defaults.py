"""How a system samples when the caller says nothing. No torch in here until `options` is called."""

from typing import Any

from pydantic import Field

from nextscale.settings import Settings


class SamplingDefaults(Settings):
    """The guidance and the filter that go with a system's weights."""

    guidance: float = Field(
        2.5, ge=0, le=1000, description="guidance weight, with a ramp that at the last scale; 1: off"
    )
    ramp: bool = Field(True, description="let the weight rise from 1 at the first scale; else it is the same at all")
    style_guidance: float | None = Field(
        None, ge=0, le=1000, description="weight of the style on its own, where a system is told one; default: the same"
    )
    top_k: int = Field(900, ge=0, le=2**24, description="keep the k most likely tokens; 0: all")
    top_p: float = Field(0.96, ge=0, le=1, description="keep the smallest set with this probability; 0: all")
    temperature: float = Field(1.0, ge=1e-6, le=1000, description="divides the logits; below 1 is sharper")
    smooth: bool = Field(False, description="mix tokens softly instead of drawing one")

    def options(self) -> dict[str, Any]:
        """Arguments `guidance` and `pick` of `ns.sample`."""
        from nextscale.sampling.guidance import apart, cfg, cfg_ramp
        from nextscale.sampling.pick import gumbel_soft, tempered, top_k_top_p

        pick = gumbel_soft(self.top_k, self.top_p) if self.smooth else top_k_top_p(self.top_k, self.top_p)
        return {
            "guidance": (cfg_ramp if self.ramp else cfg)(self.guidance)
            if self.style_guidance is None
            else apart(self.guidance, {"style": self.style_guidance}, ramp=self.ramp),
            "pick": pick if self.temperature == 1 else tempered(pick, self.temperature),
        }

    def words(self) -> str:
        """The same for a title."""
        kinds = {", constant": not self.ramp, f", temperature {self.temperature:g}": self.temperature != 1}
        style = "" if self.style_guidance is None else f" and {self.style_guidance:g} for the style"
        changed = "".join(words for words, said in kinds.items() if said)
        smooth = ", smooth" if self.smooth else ""
        return f"guidance {self.guidance:g}{style}{changed}, top-k {self.top_k}, top-p {self.top_p:g}{smooth}"
