# Homebrew formula. Homebrew takes formulae from taps only. From a checkout:
#
#   brew tap-new --no-git local/cri-vz
#   cp hack/cri-vz.rb "$(brew --repository local/cri-vz)/Formula/"
#   brew install --HEAD local/cri-vz/cri-vz
class CriVz < Formula
  desc "Kubernetes container runtime whose pods are virtual machines"
  homepage "https://github.com/cri-vz/cri-vz"
  license "Apache-2.0"
  head "https://github.com/cri-vz/cri-vz.git", branch: "main"

  depends_on "go" => :build
  depends_on macos: :ventura

  def install
    system "make", "build", "agent"
    bin.install "bin/cri-vz"
    libexec.install Dir["bin/cri-vz-agent-*"]
    pkgshare.install "hack/vz.entitlements"
  end

  # Homebrew rewrites and signs anew what it installs, without entitlements.
  def post_install
    system "codesign", "--force", "--sign", "-", "--entitlements", pkgshare/"vz.entitlements", bin/"cri-vz"
  end

  service do
    run [opt_bin/"cri-vz", "serve"]
    keep_alive successful_exit: false
    process_type :interactive
    log_path var/"log/cri-vz.log"
    error_log_path var/"log/cri-vz.log"
  end

  def caveats
    <<~EOS
      Pods boot a Linux kernel, which has to be fetched once:
        cri-vz guest build --agent #{opt_libexec}/cri-vz-agent-#{Hardware::CPU.arm? ? "arm64" : "amd64"} --kernel FILE
      FILE is a Debian linux-image package or an uncompressed arm64 Image.
      cri-vz doctor says what else is missing. Pods end when you log out.
    EOS
  end

  test do
    assert_match "cri-vz", shell_output("#{bin}/cri-vz version")
  end
end
