package csi

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	csiv1 "github.com/meshid/meshid/proto/csi/v1"
	kubeletv1 "github.com/meshid/meshid/proto/kubelet/v1"
	"github.com/meshid/meshid/test/require"
)

// kubelet calls a driver as the kubelet does.
type kubelet struct {
	t        *testing.T
	dir      string // its root
	source   string
	ready    error
	driver   *Driver
	identity csiv1.IdentityClient
	node     csiv1.NodeClient
	reg      kubeletv1.RegistrationClient
}

const volume = "csi-0123456789abcdef"

func newKubelet(t *testing.T) *kubelet {
	t.Helper()
	require.Root(t)
	k := &kubelet{t: t, dir: t.TempDir(), source: filepath.Join(t.TempDir(), "socket")}
	for _, dir := range []string{k.source, filepath.Join(k.dir, "pods"), filepath.Join(k.dir, "plugins_registry")} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	var err error
	k.driver, err = New(Config{KubeletDir: k.dir, NodeName: "n1"}, Options{
		SocketDir: k.source, Version: "v1", Ready: func() error { return k.ready },
		Logger: slog.New(slog.DiscardHandler), Registerer: prometheus.NewRegistry(),
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- k.driver.Run(ctx) }()
	t.Cleanup(func() {
		stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	dial := func(path string) *grpc.ClientConn {
		conn, err := grpc.NewClient("unix:"+path, grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithDefaultCallOptions(grpc.WaitForReady(true)))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := conn.Close(); err != nil {
				t.Error(err)
			}
		})
		return conn
	}
	k.reg = kubeletv1.NewRegistrationClient(dial(filepath.Join(k.dir, "plugins_registry", "csi.meshid.io-reg.sock")))
	info, err := k.reg.GetInfo(t.Context(), &kubeletv1.InfoRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if info.GetType() != "CSIPlugin" || info.GetName() != "csi.meshid.io" || len(info.GetSupportedVersions()) != 1 {
		t.Errorf("registration: %v", info)
	}
	if _, err := k.reg.NotifyRegistrationStatus(t.Context(), &kubeletv1.RegistrationStatus{PluginRegistered: true}); err != nil {
		t.Error(err)
	}
	conn := dial(info.GetEndpoint())
	k.identity, k.node = csiv1.NewIdentityClient(conn), csiv1.NewNodeClient(conn)
	return k
}

// pod makes a pod's folder and returns where its volume is to be mounted.
func (k *kubelet) pod(uid string) string {
	k.t.Helper()
	target := filepath.Join(k.dir, "pods", uid, "volumes", "kubernetes.io~csi", "meshid", "mount")
	if err := os.MkdirAll(filepath.Dir(target), 0o755); err != nil {
		k.t.Fatal(err)
	}
	k.t.Cleanup(func() { _ = unix.Unmount(target, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW) })
	return target
}

func (k *kubelet) publish(target string, changes ...func(*csiv1.NodePublishVolumeRequest)) error {
	r := &csiv1.NodePublishVolumeRequest{
		VolumeId: volume, TargetPath: target, Readonly: true,
		VolumeCapability: &csiv1.VolumeCapability{AccessType: &csiv1.VolumeCapability_Mount{Mount: &csiv1.VolumeCapability_MountVolume{}}},
		VolumeContext:    map[string]string{ephemeral: "true", podName: "web-1", podNamespace: "shop"},
	}
	for _, change := range changes {
		change(r)
	}
	_, err := k.node.NodePublishVolume(k.t.Context(), r)
	return err
}

func (k *kubelet) unpublish(target string) error {
	_, err := k.node.NodeUnpublishVolume(k.t.Context(), &csiv1.NodeUnpublishVolumeRequest{VolumeId: volume, TargetPath: target})
	return err
}

// listen makes the workload socket, as an agent that starts does.
func (k *kubelet) listen() net.Listener {
	k.t.Helper()
	l, err := net.Listen("unix", filepath.Join(k.source, "agent.sock"))
	if err != nil {
		k.t.Fatal(err)
	}
	return l
}

func (k *kubelet) wantConnect(target string) {
	k.t.Helper()
	dir, err := os.Open(target) // a socket's path is short
	if err != nil {
		k.t.Error(err)
		return
	}
	defer dir.Close()
	conn, err := net.Dial("unix", fmt.Sprintf("/proc/self/fd/%d/agent.sock", dir.Fd()))
	if err != nil {
		k.t.Error(err)
		return
	}
	_ = conn.Close()
}

// A pod's folder is mounted, read-only, survives the agent, and is taken away.
func TestPodUsesTheSocket(t *testing.T) {
	k := newKubelet(t)
	target := k.pod("11111111-2222-3333-4444-555555555555")
	l := k.listen()
	for range 2 { // the kubelet repeats
		if err := k.publish(target); err != nil {
			t.Fatal(err)
		}
	}
	k.wantConnect(target)
	var st unix.Statfs_t
	if err := unix.Statfs(target, &st); err != nil {
		t.Fatal(err)
	}
	for name, flag := range map[string]int64{"ro": unix.ST_RDONLY, "nosuid": unix.ST_NOSUID, "nodev": unix.ST_NODEV, "noexec": unix.ST_NOEXEC} {
		if st.Flags&flag == 0 {
			t.Errorf("the mount is not %s", name)
		}
	}
	if err := os.WriteFile(filepath.Join(target, "x"), nil, 0o600); !errors.Is(err, unix.EROFS) {
		t.Errorf("writing into the mount: %v", err)
	}
	if err := os.WriteFile(filepath.Join(k.source, "x"), nil, 0o600); err != nil {
		t.Errorf("the agent's own folder is read-only too: %v", err)
	}

	// An agent that is started again makes its socket anew, in the same folder.
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	l = k.listen()
	defer l.Close()
	k.wantConnect(target)
	stats, err := k.node.NodeGetVolumeStats(t.Context(), &csiv1.NodeGetVolumeStatsRequest{VolumeId: volume, VolumePath: target})
	if err != nil || stats.GetVolumeCondition().GetAbnormal() {
		t.Errorf("%v, %v", stats, err)
	}

	for range 2 {
		if err := k.unpublish(target); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := os.Lstat(target); !os.IsNotExist(err) {
		t.Errorf("the folder of the mount stays behind: %v", err)
	}
	if _, err := os.Stat(filepath.Join(k.source, "agent.sock")); err != nil {
		t.Errorf("unmounting took the socket: %v", err)
	}
	_, err = k.node.NodeGetVolumeStats(t.Context(), &csiv1.NodeGetVolumeStatsRequest{VolumeId: volume, VolumePath: target})
	if status.Code(err) != codes.NotFound {
		t.Errorf("stats of what is not mounted: %v", err)
	}
	if got := testutil.ToFloat64(k.driver.calls.WithLabelValues(callPublish, outcomeOK)); got != 2 {
		t.Errorf("%v calls were counted", got)
	}
}

// A folder that was made anew is not what pods have mounted: it is said, and a pod
// that starts then gets the new one.
func TestFolderMadeAnew(t *testing.T) {
	k := newKubelet(t)
	target := k.pod("pod")
	if err := k.publish(target); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(k.source, k.source+".old"); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(k.source, 0o755); err != nil {
		t.Fatal(err)
	}
	stats, err := k.node.NodeGetVolumeStats(t.Context(), &csiv1.NodeGetVolumeStatsRequest{VolumeId: volume, VolumePath: target})
	if err != nil || !stats.GetVolumeCondition().GetAbnormal() {
		t.Errorf("%v, %v", stats, err)
	}
	defer k.listen().Close()
	if err := k.publish(target); err != nil {
		t.Fatal(err)
	}
	k.wantConnect(target)
	if err := k.unpublish(target); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(target); !os.IsNotExist(err) {
		t.Errorf("a mount stays behind: %v", err)
	}
}

// Whatever is asked for, nothing is mounted but below the folder of pods.
func TestTargetsThatAreNone(t *testing.T) {
	k := newKubelet(t)
	elsewhere := t.TempDir()
	good := k.pod("pod")
	link := filepath.Join(k.dir, "pods", "linked")
	if err := os.Symlink(filepath.Join(k.dir, "pods", "pod"), link); err != nil {
		t.Fatal(err)
	}
	volumes := filepath.Join(k.dir, "pods", "evil", "volumes", "kubernetes.io~csi")
	if err := os.MkdirAll(volumes, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(elsewhere, filepath.Join(volumes, "out")); err != nil {
		t.Fatal(err)
	}
	inside := filepath.Join(volumes, "in")
	if err := os.Mkdir(inside, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(elsewhere, filepath.Join(inside, "mount")); err != nil {
		t.Fatal(err)
	}
	for _, target := range []string{
		"", "/", "mount", elsewhere, filepath.Join(elsewhere, "mount"), k.dir, filepath.Dir(good), good + "/", good + "/mount",
		strings.Replace(good, "kubernetes.io~csi", "kubernetes.io~empty-dir", 1),
		strings.Replace(good, "/pod/", "/pod/../pod/", 1), strings.Replace(good, "/pod/", "/../", 1),
		filepath.Join(link, "volumes", "kubernetes.io~csi", "meshid", "mount"),
		filepath.Join(volumes, "out", "mount"), filepath.Join(inside, "mount"),
		filepath.Join(k.dir, "pods", "none", "volumes", "kubernetes.io~csi", "meshid", "mount"),
	} {
		if err := k.publish(target); err == nil {
			t.Errorf("%q: mounted", target)
		}
	}
	// Nor is anything unmounted there: a link in the place of the mount is not followed.
	if err := unix.Mount("none", elsewhere, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	_ = k.unpublish(filepath.Join(inside, "mount")) // whether it complains or not
	if err := unix.Unmount(elsewhere, 0); err != nil {
		t.Errorf("what is mounted elsewhere was unmounted: %v", err)
	}
	entries, err := os.ReadDir(elsewhere)
	if err != nil || len(entries) != 0 {
		t.Errorf("outside there is %v, %v", entries, err)
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(mounts), k.dir) || strings.Contains(string(mounts), elsewhere) {
		t.Error("something is mounted")
	}
}

// What a volume must not be is said, with what to write.
func TestVolumesThatAreNone(t *testing.T) {
	k := newKubelet(t)
	target := k.pod("pod")
	for name, c := range map[string]struct {
		change func(*csiv1.NodePublishVolumeRequest)
		want   string
	}{
		"no id":      {func(r *csiv1.NodePublishVolumeRequest) { r.VolumeId = "" }, "no id"},
		"writable":   {func(r *csiv1.NodePublishVolumeRequest) { r.Readonly = false }, "readOnly: true"},
		"persistent": {func(r *csiv1.NodePublishVolumeRequest) { delete(r.VolumeContext, ephemeral) }, "podInfoOnMount: true"},
		"no kind":    {func(r *csiv1.NodePublishVolumeRequest) { r.VolumeCapability = nil }, "can be mounted"},
		"block": {func(r *csiv1.NodePublishVolumeRequest) {
			r.VolumeCapability.AccessType = &csiv1.VolumeCapability_Block{Block: &csiv1.VolumeCapability_BlockVolume{}}
		}, "no block device"},
		"options": {func(r *csiv1.NodePublishVolumeRequest) {
			r.VolumeCapability.GetMount().MountFlags = []string{"exec"}
		}, "leave them out"},
	} {
		err := k.publish(target, c.change)
		if status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	k.ready = errors.New("not yet")
	if err := k.publish(target); status.Code(err) != codes.Unavailable {
		t.Errorf("without a socket: %v", err)
	}
	probe, err := k.identity.Probe(t.Context(), &csiv1.ProbeRequest{})
	if err != nil || probe.GetReady().GetValue() {
		t.Errorf("%v, %v", probe, err)
	}
	if _, err := os.Lstat(target); !os.IsNotExist(err) {
		t.Errorf("a folder was made: %v", err)
	}
}

func TestConfiguration(t *testing.T) {
	for want, c := range map[string]Config{
		"driver":      {Driver: "CSI_meshid", NodeName: "n1"},
		"kubelet_dir": {KubeletDir: "kubelet", NodeName: "n1"},
		"node_name":   {},
	} {
		if _, err := New(c, Options{Registerer: prometheus.NewRegistry()}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: %v", c, err)
		}
	}
}
