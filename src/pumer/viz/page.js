// Follow a token through the panels of its map: highlight it everywhere, and say what happened.
for (const map of document.querySelectorAll(".token-map")) {
  const panels = [...map.querySelectorAll(".panel")];
  const line = map.querySelector(".trace");
  const members = (node, kind) => (node.dataset[kind] ?? "").split(" ");

  const clear = () => {
    for (const node of map.querySelectorAll(".on")) node.classList.remove("on");
    line.textContent = "";
  };

  const describe = (node, kind) => {
    const unit = kind === "patches" ? "patches" : "words";
    if (!node || node.classList.contains("dropped")) return "dropped";
    const count = members(node, kind).length;
    return count > 1 ? `one token of ${count} ${unit}` : "kept";
  };

  const follow = (target) => {
    const kind = target.dataset.patches === undefined ? "words" : "patches";
    const wanted = new Set(members(target, kind));
    clear();
    const steps = [];
    for (const panel of panels) {
      const nodes = [...panel.querySelectorAll(`[data-${kind}]`)];
      const hits = nodes.filter((node) => members(node, kind).some((index) => wanted.has(index)));
      for (const node of hits) node.classList.add("on");
      if (panel !== panels[0]) {
        const fates = [...new Set((hits.length ? hits : [null]).map((node) => describe(node, kind)))];
        steps.push(`${panel.dataset.when}: ${fates.join(", ")}`);
      }
    }
    const [single, several] = kind === "patches" ? ["patch", "patches"] : ["word", "words"];
    const subject = wanted.size > 1 ? `These ${wanted.size} ${several}` : `This ${single}`;
    line.textContent = `${subject} \u2013 ${steps.join("; ")}.`;
  };

  map.addEventListener("pointerover", (event) => {
    const target = event.target.closest("[data-patches], [data-words]");
    if (target) follow(target);
  });
  map.addEventListener("pointerleave", (event) => {
    if (event.pointerType === "mouse") clear();
  });
}
