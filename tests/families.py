"""One row a generator family: a tiny random checkpoint of its own file layout, and what its stock pipeline is given.

A new family is one row here. What is proven of each is in ``tests/integration/test_families.py``.
"""

from collections.abc import Mapping
from types import MappingProxyType

from checkpoints import write_stable_diffusion, write_wan, write_wan22_a14b, write_wan22_ti2v
from family import Family
from language_checkpoints import write_flux2_dev, write_flux2_klein, write_sana, write_z_image
from picture_checkpoints import write_flux, write_stable_diffusion_3, write_stable_diffusion_xl
from qwen_image_checkpoints import write_qwen_image, write_qwen_image_21
from video_checkpoints import write_cogvideox, write_hunyuan_video, write_ltx2

_GUIDED = MappingProxyType({"guidance_scale": 4.0, "negative_prompt": "blurry"})
_SCHEDULER = "scheduler/scheduler_config.json"
_NETWORK = "transformer/config.json"
_GUIDER = "guider/guider_config.json"
_INDEX = "model_index.json"

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "flux": Family(
            "flux",
            write_flux,
            ("text_encoder", "text_encoder_2", "transformer", "vae"),
            {"guidance_scale": 3.5},
            gives_levels=True,
            refused=(
                (_INDEX, {"_class_name": "FluxKontextPipeline"}, "_class_name 'FluxKontextPipeline'"),
                (_NETWORK, {"in_channels": 384, "out_channels": 64}, "in_channels 384 .*FLUX Fill"),
                (_NETWORK, {"patch_size": 2}, "transformer: patch_size 2"),
                ("vae/config.json", {"latent_channels": 16}, "vae: latent_channels 16, but the transformer's"),
                (_SCHEDULER, {"invert_sigmas": True}, "invert_sigmas True replaces"),
                (_SCHEDULER, {"num_train_timesteps": 500}, "num_train_timesteps 500"),
                (_SCHEDULER, {"time_shift_type": "other"}, "time_shift_type 'other' is not"),
                (_SCHEDULER, {"shift_terminal": "x"}, "shift_terminal 'x' is no noise level"),
                (_NETWORK, {"in_channels": None, "out_channels": None}, "transformer's in_channels are None"),
                (_SCHEDULER, {"shift": None, "use_dynamic_shifting": False}, "its shift cannot be read"),
                (
                    _SCHEDULER,
                    {"shift": -1.0, "use_dynamic_shifting": False},
                    "its shift is -1, a time shift is above 0",
                ),
                (
                    _SCHEDULER,
                    {"use_dynamic_shifting": True, "max_image_seq_len": 256},
                    r"its shift cannot be read \(ZeroDivisionError",
                ),
            ),
            misfits=(
                ({"negative_prompt": "blurry"}, "negative_prompt: family 'flux' has no classifier-free guidance"),
                ({"max_sequence_length": 513}, "max_sequence_length 513 is above 512, the limit of FluxPipeline"),
            ),
        ),
        "sd": Family(
            "sd",
            write_stable_diffusion,
            ("text_encoder", "unet", "vae"),
            {**_GUIDED, "max_sequence_length": 512},
            refused=(
                ("unet/config.json", {"time_cond_proj_dim": 32}, "unet: time_cond_proj_dim 32: .*LCM"),
                ("unet/config.json", {"class_embed_type": "timestep"}, "unet: class_embed_type 'timestep'"),
                ("unet/config.json", {"num_class_embeds": 3}, "unet: num_class_embeds 3"),
                (
                    "unet/config.json",
                    {"addition_embed_type": "text_time"},
                    "unet: addition_embed_type 'text_time'.*SDXL",
                ),
                ("unet/config.json", {"encoder_hid_dim_type": "ip_image_proj"}, "unet: encoder_hid_dim_type"),
                ("unet/config.json", {"dual_cross_attention": True}, "unet: dual_cross_attention True: .*Versatile"),
                ("unet/config.json", {"in_channels": 9}, "unet: in_channels 9 and out_channels 4, as in inpainting"),
                ("vae/config.json", {"latent_channels": 16}, "vae: latent_channels 16, but the unet's in_channels"),
                ("vae/config.json", {"scaling_factor": None}, "vae: scaling_factor None is no number"),
                ("vae/config.json", {"shift_factor": "x"}, "vae: shift_factor 'x' is no number"),
                ("vae/config.json", {"out_channels": 1}, "vae: out_channels 1: it makes no pictures of red"),
                (_INDEX, {"_class_name": "StableDiffusionXLPipeline"}, "'StableDiffusionXLPipeline'; family"),
                (_SCHEDULER, {"timestep_spacing": "karras"}, "timestep_spacing 'karras' is not"),
                (_SCHEDULER, {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr True"),
                (_SCHEDULER, {"thresholding": True}, "thresholding True is not held"),
                (_SCHEDULER, {"prediction_type": "sample"}, "prediction_type 'sample'"),
            ),
        ),
        "wan": Family(
            "wan",
            write_wan,
            ("text_encoder", "transformer", "vae"),
            {**_GUIDED, "frames": 9},
            refused=(
                (
                    _INDEX,
                    {"boundary_ratio": 0.9},
                    r"two transformers .*family=wan22_a14b",
                ),
                (_INDEX, {"transformer_2": ["diffusers", "WanTransformer3DModel"]}, "two transformers"),
                (_INDEX, {"expand_timesteps": True}, "its own timestep"),
                (
                    _INDEX,
                    {"vae": ["diffusers", "AutoencoderKL"]},
                    "vae class 'AutoencoderKL' is not one of Autoencoder",
                ),
                (_INDEX, {"transformer": [None, None]}, "transformer class 'None' is not one of WanTransformer3DModel"),
                (_INDEX, {"_class_name": "WanImageToVideoPipeline"}, "'WanImageToVideoPipeline'"),
                (
                    _INDEX,
                    {"_class_name": "LTX2ImageToVideoPipeline"},
                    "'LTX2I.*'; .* family 'ltx2' holds LTX2Pipeline",
                ),
                (_NETWORK, {"image_dim": 1280}, "transformer: image_dim 1280: .*image-to-video"),
                (_NETWORK, {"added_kv_proj_dim": 24}, "transformer: added_kv_proj_dim 24"),
                (_NETWORK, {"pos_embed_seq_len": 514}, "transformer: pos_embed_seq_len 514"),
                (_NETWORK, {"in_channels": 36}, "in_channels 36 and out_channels 16, as in image-to"),
                ("vae/config.json", {"z_dim": 48}, "vae: z_dim 48, but the transformer's in_channels are 16"),
                ("vae/config.json", {"latents_mean": [0.0]}, "vae: latents_mean has 1 numbers for 16 latent channels"),
                ("vae/config.json", {"out_channels": 12}, "vae: out_channels 12: it makes no pictures of red"),
                (
                    _SCHEDULER,
                    {"_class_name": "UniPCMultistepScheduler", "prediction_type": "epsilon"},
                    "prediction_type 'epsilon'",
                ),
                (
                    _SCHEDULER,
                    {"_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction"},
                    "use_flow_sigmas is not set",
                ),
                (_SCHEDULER, {"use_karras_sigmas": True}, "use_karras_sigmas True replaces"),
                (_SCHEDULER, {"use_dynamic_shifting": True}, "use_dynamic_shifting is set"),
            ),
        ),
        "wan22_a14b": Family(
            "wan22_a14b",
            write_wan22_a14b,
            ("text_encoder", "transformer", "transformer_2", "vae"),
            {**_GUIDED, "guidance_scale_2": 3.0, "frames": 9},
            refused=(
                (_INDEX, {"boundary_ratio": None}, "boundary_ratio None: no noise level between 0 and 1"),
                (_INDEX, {"boundary_ratio": 1.5}, "boundary_ratio 1.5: no noise level"),
                (_INDEX, {"transformer_2": [None, None]}, "transformer_2 class 'None' is not one of WanTransformer3D"),
                (_INDEX, {"expand_timesteps": True}, "its own timestep"),
                ("transformer_2/config.json", {"image_dim": 1280}, "image_dim 1280: .*image-to-video"),
            ),
            misfits=(({"guidance_scale": 1.0}, "guidance_scale_2 3.0: guidance_scale 1.0 turns guidance off"),),
        ),
        "wan22_ti2v": Family(
            "wan22_ti2v",
            write_wan22_ti2v,
            ("text_encoder", "transformer", "vae"),
            {**_GUIDED, "frames": 9, "width": 64},
            refused=(
                (
                    _INDEX,
                    {"boundary_ratio": 0.9},
                    r"two transformers .*family=wan22_a14b",
                ),
                (_INDEX, {"expand_timesteps": False}, "gives every token one timestep; set generator.family=wan"),
                (_NETWORK, {"in_channels": 36}, "in_channels 36 and out_channels 8, as in image-to-video"),
            ),
        ),
        "sana": Family(
            "sana",
            write_sana,
            ("text_encoder", "transformer", "vae"),
            {**_GUIDED, "width": 64},
            refused=(
                (_NETWORK, {"guidance_embeds": True}, "guidance_embeds True: .*Sprint"),
                (_NETWORK, {"out_channels": 8}, "in_channels 4 and out_channels 8, as in checkpoints that predict"),
                ("vae/config.json", {"latent_channels": 32}, "latent_channels 32, but the transformer's in_channels"),
                (_SCHEDULER, {"_class_name": "DPMSolverMultistepScheduler"}, "use_flow_sigmas is not set"),
                (_SCHEDULER, {"use_dynamic_shifting": True}, "use_dynamic_shifting is set"),
            ),
        ),
        "hunyuan_video": Family(
            "hunyuan_video",
            write_hunyuan_video,
            ("text_encoder", "text_encoder_2", "transformer", "vae"),
            {**_GUIDED, "frames": 9, "max_sequence_length": 700},
            gives_levels=True,
            unreached=r"image_embedder|transformer_blocks\.1\.(ff_context|attn\.(add_q_proj|to_add_out|norm_added_q))",
            refused=(
                (_NETWORK, {"use_meanflow": True}, "use_meanflow True: .*second timestep"),
                (_NETWORK, {"in_channels": 4}, "in_channels 4 and out_channels 4; HunyuanVideo 1.5 takes"),
                ("vae/config.json", {"latent_channels": 32}, "latent_channels 32, but the transformer's in_channels"),
                (_GUIDER, {"guidance_rescale": 0.7}, "guider: guidance_rescale 0.7: .*give a checkpoint with 0.0"),
                (_GUIDER, {"use_original_formulation": True}, "guider: use_original_formulation True"),
                (_GUIDER, {"start": 0.2}, "guider: start 0.2"),
                (_GUIDER, {"stop": 0.5}, "guider: stop 0.5"),
                (
                    _INDEX,
                    {"guider": ["diffusers", "AdaptiveProjectedGuidance"]},
                    "guider class 'AdaptiveProjectedGuidance' is not one of ClassifierFreeGuidance",
                ),
                (_INDEX, {"_class_name": "HunyuanVideo15ImageToVideoPipeline"}, "'HunyuanVideo15ImageToVideoPipeline'"),
            ),
        ),
        "ltx2": Family(
            "ltx2",
            write_ltx2,
            ("text_encoder", "connectors", "transformer", "vae"),
            {**_GUIDED, "frames": 9, "width": 64, "max_sequence_length": 32},
            gives_levels=True,
            refused=(
                (_INDEX, {"_class_name": "LTX2ConditionPipeline"}, "'LTX2ConditionPipeline'; .* no sound, no first"),
                (
                    _INDEX,
                    {"text_encoder": ["transformers", "Gemma4UnifiedForConditionalGeneration"]},
                    "text_encoder 'Gemma4Unified.*holds LTX-2 and 2.3",
                ),
                (_NETWORK, {"patch_size": 2}, "patch_size 2, patch_size_t 1; LTX-2 has 1 and 1"),
                (_NETWORK, {"in_channels": 8}, "in_channels 8 and out_channels 4, as in checkpoints that take a cond"),
                (
                    "vae/config.json",
                    {"latent_channels": 8},
                    "latent_channels 8, but the transformer's in_channels are 4",
                ),
                ("vae/config.json", {"decoder_inject_noise": [True, False, False]}, "draws noise while it decodes"),
                (
                    "connectors/config.json",
                    {"video_connector_num_learnable_registers": None},
                    "video_connector_num_learnable_registers None",
                ),
            ),
            misfits=(({"max_sequence_length": 30}, "max_sequence_length 30 is not a multiple of 8, the registers"),),
        ),
        "ltx2_3": Family(
            "ltx2",
            lambda folder: write_ltx2(folder, modulated=True),
            (),
            {**_GUIDED, "frames": 9, "width": 64, "max_sequence_length": 32},
            gives_levels=True,
        ),
        "cogvideox": Family(
            "cogvideox",
            write_cogvideox,
            ("text_encoder", "transformer", "vae"),
            {**_GUIDED, "frames": 9},
            steps=4,
            refused=(
                (_NETWORK, {"ofs_embed_dim": 512}, "ofs_embed_dim 512: .*image-to-video"),
                (_NETWORK, {"use_learned_positional_embeddings": True}, "use_learned_positional_embeddings True"),
                (_NETWORK, {"in_channels": 8}, "in_channels 8 and out_channels 4, as in image-to-video and control"),
                (_NETWORK, {"max_text_seq_length": 226}, "max_sequence_length 12: the network takes 226 text tokens"),
                (_INDEX, {"_class_name": "CogVideoXImageToVideoPipeline"}, "'CogVideoXImageToVideoPipeline'; family"),
            ),
            misfits=(({"frames": 13}, r"generator\.frames 13 is not of the form 1 \+ 8 k"),),
        ),
        "cogvideox_15": Family(
            "cogvideox",
            lambda folder: write_cogvideox(folder, rotary=True, pairs=True),
            (),
            {**_GUIDED, "frames": 9},
            steps=4,
        ),
        "cogvideox_rotary": Family(
            "cogvideox",
            lambda folder: write_cogvideox(folder, rotary=True),
            (),
            {**_GUIDED, "frames": 9},
            steps=4,
        ),
        "sdxl": Family(
            "sdxl",
            write_stable_diffusion_xl,
            ("text_encoder", "text_encoder_2", "unet", "vae"),
            {**_GUIDED, "max_sequence_length": 512},
            refused=(
                (
                    "unet/config.json",
                    {"addition_embed_type": None},
                    "addition_embed_type None; Stable Diffusion XL",
                ),
                ("unet/config.json", {"time_cond_proj_dim": 32}, "unet: time_cond_proj_dim 32: .*LCM"),
                ("unet/config.json", {"in_channels": 9}, "in_channels 9 and out_channels 4, as in inpainting"),
                ("vae/config.json", {"latents_mean": [0.0] * 4}, "vae: latents_mean is set, as in Playground"),
                (_INDEX, {"_class_name": "StableDiffusionXLImg2ImgPipeline"}, "'StableDiffusionXLImg2ImgPipeline'"),
                (_SCHEDULER, {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr True is not held"),
                (_SCHEDULER, {"clip_sample": True}, "clip_sample True .*set it to false"),
            ),
        ),
        "sdxl_v": Family(
            "sdxl",
            lambda folder: write_stable_diffusion_xl(folder, "v_prediction"),
            (),
            {"guidance_scale": 4.0, "max_sequence_length": 512},
        ),
        "sd3": Family(
            "sd3",
            write_stable_diffusion_3,
            ("text_encoder", "text_encoder_2", "text_encoder_3", "transformer", "vae"),
            _GUIDED,
            unreached=r"transformer_blocks\.1\.attn\.(add_q_proj|norm_added_q)",
            refused=(
                (
                    _INDEX,
                    {"_class_name": "StableDiffusion3ControlNetPipeline"},
                    "'StableDiffusion3ControlNetPipeline'; family",
                ),
                (_NETWORK, {"in_channels": 9}, "in_channels 9 and out_channels 4, as in inpainting and control"),
                (_NETWORK, {"patch_size": 4}, "patch_size 4; Stable Diffusion 3 has 2"),
                (
                    "vae/config.json",
                    {"latent_channels": 16},
                    "latent_channels 16, but the transformer's in_channels are 4",
                ),
            ),
            misfits=(({"width": 100}, "generator.width 100: the network has positions for 96 pixels a side"),),
        ),
        "flux2_klein": Family(
            "flux2_klein",
            write_flux2_klein,
            ("text_encoder", "transformer", "vae"),
            # The stock pipeline is guided away from the empty prompt alone.
            {"guidance_scale": 4.0, "max_sequence_length": 60},
            gives_levels=True,
            refused=(
                (_NETWORK, {"patch_size": 2}, "patch_size 2; FLUX.2 has 1"),
                (_NETWORK, {"out_channels": 32}, "in_channels 16 and out_channels 32, as in editing"),
                ("vae/config.json", {"latent_channels": 32}, "latent_channels 32, but the transformer's in_channels"),
                (_INDEX, {"_class_name": "Flux2Pipeline"}, "'Flux2Pipeline'; family 'flux2_klein' holds Flux2Klein"),
            ),
            misfits=(({"negative_prompt": "blurry"}, "guided away from the empty prompt alone"),),
        ),
        "flux2_klein_distilled": Family(
            "flux2_klein",
            lambda folder: write_flux2_klein(folder, distilled=True),
            (),
            {"guidance_scale": 4.0, "max_sequence_length": 60},
            gives_levels=True,
        ),
        "flux2_dev": Family(
            "flux2_dev",
            write_flux2_dev,
            ("text_encoder", "transformer", "vae"),
            {"guidance_scale": 2.5, "max_sequence_length": 200},
            gives_levels=True,
            refused=((_INDEX, {"_class_name": "Flux2KleinPipeline"}, "'Flux2KleinPipeline'; family 'flux2_dev'"),),
        ),
        "qwen_image": Family(
            "qwen_image",
            write_qwen_image,
            ("text_encoder", "transformer", "vae"),
            {**_GUIDED, "max_sequence_length": 240},
            unreached=r"transformer_blocks\.1\.(txt_mlp|attn\.(add_q_proj|to_add_out|norm_added_q))",
            gives_levels=True,
            refused=(
                (_NETWORK, {"guidance_embeds": True}, "guidance_embeds True: its network takes the guidance scale"),
                (_NETWORK, {"zero_cond_t": True}, "zero_cond_t True: .*Qwen-Image-Edit"),
                (_NETWORK, {"use_layer3d_rope": True}, "use_layer3d_rope True: .*Qwen-Image-Layered"),
                (_NETWORK, {"in_channels": 32}, "in_channels 32 and out_channels 16, as in editing"),
                ("vae/config.json", {"z_dim": 16}, "vae: z_dim 16, but the transformer's in_channels are 16"),
                (_INDEX, {"_class_name": "QwenImageEditPipeline"}, "'QwenImageEditPipeline'; family 'qwen_image'"),
            ),
        ),
        "qwen_image_21": Family(
            "qwen_image_21",
            write_qwen_image_21,
            ("text_encoder", "transformer", "vae"),
            {**_GUIDED, "max_sequence_length": 80, "width": 64},
            gives_levels=True,
            refused=(
                (_NETWORK, {"patch_size": 2}, "patch_size 2; Qwen-Image 2.1 has 1"),
                (_NETWORK, {"causal_condition": False}, "causal_condition False: its words would be modulated"),
                (_NETWORK, {"in_channels": 16}, "in_channels 16 and out_channels 8, as in checkpoints that take a"),
                ("vae/config.json", {"z_dim": 16}, "vae: z_dim 16, but the transformer's in_channels are 8"),
                ("vae/config.json", {"out_channels": 3}, "out_channels 3: .* red, green, blue and transparency"),
                ("vae/config.json", {"dim_mult": [1, 1, 1, 1]}, "a latent pixel has 8 pixels a side"),
                (_INDEX, {"_class_name": "QwenImagePipeline"}, "'QwenImagePipeline'; family 'qwen_image_21' holds"),
            ),
            misfits=(({"width": 48}, "generator.width 48 is not a multiple of 32"),),
        ),
        "z_image": Family(
            "z_image",
            write_z_image,
            ("text_encoder", "transformer", "vae"),
            {**_GUIDED, "max_sequence_length": 60, "width": 40},
            gives_levels=True,
            refused=(
                (_NETWORK, {"siglip_feat_dim": 8}, "siglip_feat_dim 8: .*Z-Image Omni"),
                (_NETWORK, {"all_patch_size": [1, 2]}, r"all_patch_size \[1, 2\], all_f_patch_size \[1\]; Z-Image"),
                ("vae/config.json", {"latent_channels": 16}, "latent_channels 16, but the transformer's in_channels"),
                (_INDEX, {"_class_name": "ZImageOmniPipeline"}, "'ZImageOmniPipeline'; family 'z_image'"),
                (_SCHEDULER, {"use_karras_sigmas": True}, "use_karras_sigmas True replaces"),
            ),
            misfits=(
                ({"max_sequence_length": 127}, "max_sequence_length 127 needs 130 positions, the network has 128"),
                ({"width": 132}, "generator.width 132 needs 33 positions, the network has 32"),
            ),
        ),
        "sd3_without_t5": Family(
            "sd3",
            lambda folder: write_stable_diffusion_3(folder, t5=False),
            ("text_encoder_2",),
            _GUIDED,
            unreached=r"transformer_blocks\.1\.attn\.(add_q_proj|norm_added_q)",
        ),
    }
)
