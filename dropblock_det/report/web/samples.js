// The same validation images under every setting: boxes, or a label for the whole image.

const RIGHT = "#009e73", WRONG = "#d55e00", MISSED = "#cc79a7", TRUTH = "#f0e442";

function iou([ax, ay, aw, ah], [bx, by, bw, bh]) {
  const w = Math.min(ax + aw, bx + bw) - Math.max(ax, bx), h = Math.min(ay + ah, by + bh) - Math.max(ay, by);
  return w <= 0 || h <= 0 ? 0 : w * h / (aw * ah + bw * bh - w * h);
}
/** Greedily, best score first, as COCO does. */
function matched(predicted, truth) {
  const free = new Set(truth), right = [], wrong = [];
  for (const mark of [...predicted].sort((a, b) => b.score - a.score)) {
    const same = [...free].filter(t => t.category === mark.category).map(t => [iou(t.bbox, mark.bbox), t]);
    const [hit] = same.sort((a, b) => b[0] - a[0]);
    if (hit && hit[0] >= .5) { free.delete(hit[1]); right.push(mark); } else wrong.push(mark);
  }
  return { right, wrong, missed: [...free] };
}

function card(image, name, note, groups, setting) {
  const swatch = setting === undefined ? [] : [html("i", { class: "swatch", style: `background:${colour(setting)}` })];
  return html("figure", {}, picture(image, groups), html("figcaption", {}, ...swatch, name, ...note));
}
const small = (text, kind = "") => html("small", { class: kind }, text);

/** What a kind of sample shows: the truth, and what a setting made of it. */
const kinds = {
  boxes: {
    truth: image => [[small(`${image.truth.length} object${image.truth.length === 1 ? "" : "s"}`)],
      [[image.truth, TRUTH]]],
    predicted(image, marks) {
      const { right, wrong, missed } = matched(marks.filter(m => m.score >= state.score), image.truth);
      return [[small(`${right.length} of ${image.truth.length} found, ${wrong.length} wrong`)],
        [[missed, MISSED, [.8, 1.4]], [wrong, WRONG, [3, 1.6]], [right, RIGHT]]];
    },
  },
  label: {
    truth: image => [[small(image.truth.map(t => t.category).join(", "))], []],
    predicted(image, marks) {
      const truth = new Set(image.truth.map(t => t.category));
      const lines = marks.slice(0, 3).map((m, i) => small(
        `${truth.has(m.category) ? "✓" : "✗"} ${m.category} ${(m.score ?? 0).toFixed(2)}`,
        i ? "" : truth.has(m.category) ? "better" : "worse"));
      return [lines, []];
    },
  },
};

function drawSamples() {
  const image = data.images[state.image], kind = kinds[image.kind];
  const cardOf = setting => {
    const marks = data.predicted[setting]?.[state.seed]?.[image.id];
    if (!marks) return card(image, setting, [small("no run with this seed")], [], setting);
    return card(image, setting, ...kind.predicted(image, marks), setting);
  };
  $("cards").replaceChildren(card(image, "the truth", ...kind.truth(image)), ...settings.map(cardOf));
}

function startSamples() {
  if (!data.images.length) { $("samples").hidden = true; return; }
  const runs = Object.values(data.predicted);
  const scores = runs.flatMap(Object.values).flatMap(Object.values).flat().map(m => m.score);
  if (!scores.some(s => s >= state.score)) state.score = .05; // a young detector is sure of nothing
  for (const node of document.querySelectorAll("[data-kind]"))
    node.hidden = !data.images.some(image => image.kind === node.dataset.kind);
  $("score").value = state.score;
  $("score-shown").textContent = state.score.toFixed(2);
  $("score").oninput = event => {
    state.score = +event.target.value;
    $("score-shown").textContent = state.score.toFixed(2);
    drawSamples();
  };
  const seeds = [...new Set(runs.flatMap(Object.keys))].sort((a, b) => a - b);
  state.seed = seeds[0] ?? null;
  choices("seed", seeds.length > 1 ? seeds.map(s => [s, `seed ${s}`]) : [], v => v === state.seed,
    v => { state.seed = v; drawSamples(); });
  const thumbs = document.querySelector(".thumbs");
  thumbs.append(...data.images.map((image, i) => {
    const inside = image.src ? html("img", { src: image.src, alt: "" }) : image.id;
    const button = html("button",
      { type: "button", "aria-pressed": i === 0, "aria-label": `image ${image.id}` }, inside);
    button.onclick = () => {
      state.image = i;
      [...thumbs.children].forEach((b, j) => b.setAttribute("aria-pressed", j === i));
      drawSamples();
    };
    return button;
  }));
  drawSamples();
}
