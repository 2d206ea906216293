// An image with boxes.

/** Groups are [marks, stroke, dashed]; fine is the size of lines and words. */
function picture(image, groups = [], fine = 1) {
  const { width, height } = image, view = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img" });
  if (image.src) view.append(svg("image", { href: image.src, width, height, preserveAspectRatio: "none" }));
  for (const [marks, stroke, dashed] of groups)
    for (const mark of marks) view.append(...drawnBox(image, mark, stroke, dashed, fine));
  return view;
}
function drawnBox(image, { bbox: [x, y, width, height], category, score }, stroke, dashed, fine) {
  const unit = fine * Math.max(image.width, image.height) / 100, box = { x, y, width, height, fill: "none" };
  const atRight = x > image.width * .7; // keep the words inside the picture
  return [
    svg("rect", { ...box, style: "stroke:#000", opacity: dashed ? .2 : .45, "stroke-width": unit * 1.7 }),
    svg("rect", { ...box, style: `stroke:${stroke}`, "stroke-width": unit,
      "stroke-dasharray": dashed ? dashed.map(n => n * unit).join(" ") : "" }),
    ...(category ? [svg("text", { x: atRight ? Math.min(x + width, image.width) - unit : Math.max(x, 0) + unit,
      y: Math.max(y, unit * 5.5) - unit, "text-anchor": atRight ? "end" : "start", class: "mark",
      style: `font-size:${unit * 4.6}px;stroke-width:${unit * .9}px` },
    category + (score === null || score === undefined ? "" : ` ${score.toFixed(2)}`))] : [])];
}
