// The settings that are compared, and how each is drawn.

const settings = data.results.map(result => result.setting);
const others = settings.filter(s => s !== data.reference);
const resultOf = new Map(data.results.map(result => [result.setting, result]));
const state = { metric: data.headline, epoch: "last", hidden: new Set(), layout: "together", curve: data.headline,
  image: 0, seed: null, score: 0.3 };

// Okabe and Ito's palette, its yellow darkened, and dashes as a second way to tell the settings apart.
const palette = ["#e69f00", "#56b4e9", "#009e73", "#d55e00", "#0072b2", "#cc79a7", "#b8a700"];
const dashes = ["", "7 4", "2 4", "9 3 2 3", "14 4", "5 2 1 2 1 2"];
const colour = s => s === data.reference ? "var(--ink)" : palette[others.indexOf(s) % palette.length];
const dash = s => s === data.reference ? "" : dashes[others.indexOf(s) % dashes.length];
