() => {
  // Names for those who do not see the page: the buttons that hold nothing but a picture.
  const name = () => {
    document.querySelectorAll(".examples .gallery-item").forEach((node, k) =>
      node.getAttribute("aria-label") || node.setAttribute("aria-label", `Scene ${k + 1}`));
    document.querySelectorAll("button:has(> .image-frame):not([aria-label])").forEach((node) =>
      node.setAttribute("aria-label", "Picture"));
  };
  // Generate and Cancel take each other's place: the keyboard stays there.
  let last = "";
  document.addEventListener("focusin", (event) => { last = event.target.id ?? ""; });
  document.addEventListener("pointerdown", () => { last = ""; });
  const stay = () => {
    if (!["generate", "cancel"].includes(last) || document.activeElement !== document.body) return;
    [...document.querySelectorAll("#generate, #cancel")].find((node) => node.offsetParent)?.focus();
  };
  // Where the page is one column, pictures in the making would be out of sight.
  document.addEventListener("click", (event) => {
    const result = document.getElementById("status");
    if (!event.target.closest?.("#generate") || !result) return;
    const box = result.getBoundingClientRect();
    if (box.top > window.innerHeight || box.bottom < 0)
      document.querySelector(".pictures h2")?.scrollIntoView({ behavior: "smooth", block: "start" });
  });
  const changed = () => { name(); stay(); };
  changed();
  new MutationObserver(changed).observe(document.body, { childList: true, subtree: true, attributes: true,
    attributeFilter: ["class", "hidden", "style"] });
}
