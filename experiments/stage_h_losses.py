"""Stage H's losses: Mirage's own (Eq. 4), and with the MSE that the recipe `small` adds.

    python -m experiments.stage_h_losses --perceptual DIR

    LPIPS + Gram          L_lpips + 0.1 L_gram, as in the paper
    LPIPS + Gram + MSE    the same and 2 L_mse: the Mirage of the other tables

Same steps, seeds, clips and stage A. The paper has no such table. LPIPS is SqueezeNet's, Gram on VGG's relu1_2 and
relu2_2. stage_h_losses.png shows two frames of the first held-out clip.
"""

from experiments import common


def main(args) -> None:
    clips, seeds = common.held_out(args), []
    for seed in range(1, args.seeds + 1):
        folder = args.runs / "stage_h_losses" / f"seed_{seed}"

        def without_mse(to):
            common.stage_h(args, common.reconstruction(args, seed), to, seed, mse=0)
        models = {"LPIPS + Gram": common.once(folder / "model", common.trained_with(args), without_mse),
                  "LPIPS + Gram + MSE": common.harmonised(args, seed)}
        results = common.harmonise(clips, folder, models, common.scored_on(args))
        seeds.append(common.evaluate(args, clips, results, folder / "scores"))
    common.picture(args.out / "stage_h_losses.png", clips, results, (0, 8))
    common.report("stage_h_losses", __doc__, args, {}, seeds)


if __name__ == "__main__":
    main(common.arguments(__doc__, steps=100))
