() => {
  // Names for those who do not see the page: the buttons that hold nothing but a picture.
  const name = () => {
    document.querySelectorAll(".examples .gallery-item").forEach((node, k) =>
      node.getAttribute("aria-label") || node.setAttribute("aria-label", `Scene ${k + 1}`));
    document.querySelectorAll("button:has(> .image-frame):not([aria-label])").forEach((node) =>
      node.setAttribute("aria-label", "Picture"));
  };
  name();
  new MutationObserver(name).observe(document.body, { childList: true, subtree: true });
}
